"""Domain randomization of any MuJoCo environment, declared as data.

    randomizer = Randomizer(model, specs, rng)                      # once; the model is nominal now
    randomizer.restore(); build_scene(model); randomizer.rebase()   # only if the environment itself edits the model
    randomizer.reset(data)                                          # each episode; later: interval(data, data.time)
    randomizer.actions.reset(neutral); randomizer.observations.reset(first)
    action = randomizer.actions.push(action); pixels = randomizer.image(pixels); vector = randomizer.noisy(vector)

`specs` are `Randomization`s: a field, an operation, a range, a distribution, when to draw, and which names. Every
draw starts from the nominal value. `KINDS` lists the fields. Before each picture `upload_textures(renderer, model)`
brings the graphics card's copy of the textures up to date. The first `reset` also draws what is drawn once per
environment, unless `start` was called, and so does the next one after `forget_start`.
"""

from envs.randomization.randomizer import Randomizer
from envs.randomization.sensing import Delay
from envs.randomization.spec import KINDS, Randomization, parse_specs
from envs.randomization.textures import upload_textures

__all__ = ["KINDS", "Delay", "Randomization", "Randomizer", "parse_specs", "upload_textures"]
