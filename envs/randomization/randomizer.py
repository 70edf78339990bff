"""Draws what was declared and writes it into a model, always starting from the nominal values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mujoco
import numpy as np

from envs.randomization.physics import PHYSICS, Writer
from envs.randomization.sensing import UNTOUCHED, Delay, changed_picture, noisy_vector
from envs.randomization.spec import Randomization, combine, sample, select, within_bounds
from envs.randomization.textures import texture_pixels
from envs.randomization.vision import VISION

WRITERS: dict[str, Writer] = {**PHYSICS, **VISION}
"""Field -> how the model is changed. The other fields act between simulation and policy."""

# What mj_setConst computes from masses, armatures and poses of cameras and lights, in the reference pose.
_DERIVED = (
    "actuator_acc0",
    "body_invweight0",
    "body_subtreemass",
    "cam_mat0",
    "cam_pos0",
    "cam_poscom0",
    "dof_M0",
    "dof_invweight0",
    "light_dir0",
    "light_pos0",
    "light_poscom0",
    "tendon_invweight0",
)
_STATISTICS = ("meaninertia", "meanmass", "meansize", "extent")
_OF_THE_START = 1
"""What seeds the generator of the draws at the start, together with the seed of the others."""


class Randomizer:
    """Randomizes one model. Everything it knows, its random generators included, is in plain attributes.

    nominal: array -> its values before any draw, of every array that the specs write or that follows from them.
    draws: index of the spec -> the numbers drawn last, one row for each name.
    sensing: field -> present value of what acts between simulation and policy; see `sensing.UNTOUCHED`.
    observations, actions: delay lines; `reset` sets their `steps`, the environment resets and pushes.

    Raises ValueError when a glob names nothing or a value could leave what its field can be.
    """

    def __init__(self, model: mujoco.MjModel, specs: Sequence[Randomization], rng: np.random.Generator) -> None:
        # A function, since the model belongs to the environment, with whose state it is captured.
        self._model: Callable[[], mujoco.MjModel] = lambda: model
        self.specs = tuple(specs)
        self.ids = [
            select(spec, WRITERS[spec.field].candidates(model)) if spec.field in WRITERS else np.zeros(1, np.int64)
            for spec in self.specs
        ]
        self.nominal = {name: _array(model, name).copy() for name in self._written()}
        self.draws: dict[int, np.ndarray] = {}
        self.sensing = dict(UNTOUCHED)
        self.observations, self.actions = Delay(), Delay()
        self.applied = False
        self.intervals: dict[int, int] = {}
        self.started = False
        self.seed(rng)
        self._try_the_ends_of_the_ranges()

    def seed(self, rng: np.random.Generator) -> None:
        """Draw from here on as `rng` decides. Only its seed is used: `rng` itself is not kept."""
        seeds = [int(seed) for seed in rng.integers(2**63, size=3)]
        # Separate, so that what is drawn for the next episode does not depend on how often a picture was taken.
        self.rng, self._vector_rng, self._picture_rng = map(np.random.default_rng, seeds)
        # And not on whether what is drawn once had still to be drawn.
        self._start_rng = np.random.default_rng((seeds[0], _OF_THE_START))

    # ---------------------------------------------------------------- when to draw

    def start(self) -> None:
        """Draw what is drawn once, with a generator of its own. The first `reset` does so if it was not done."""
        self._draw("start")
        self.started = True
        self._apply(None)

    def forget_start(self) -> None:
        """Let the next `reset` draw what is drawn once, too, as in an environment that was just made."""
        self.started = False

    def reset(self, data: mujoco.MjData | None = None) -> None:
        """Draw what is drawn each episode. With `data` its cameras and lights move at once."""
        if not self.started:
            self.start()
        self._draw("reset")
        self._draw("interval")
        self.intervals = {index: 0 for index, spec in enumerate(self.specs) if spec.when == "interval"}
        self._apply(data)
        self.observations, self.actions = Delay(self.observation_latency), Delay(self.action_latency)

    def interval(self, data: mujoco.MjData | None, elapsed_seconds: float) -> bool:
        """Draw what is due `elapsed_seconds` after the episode began; returns whether anything was.

        Periods that passed since the last call count as one.
        """
        due = []
        for index, done in self.intervals.items():
            period = self.specs[index].period
            assert period is not None
            passed = int(elapsed_seconds / period + 1e-9)
            if passed > done:
                self.intervals[index] = passed
                due.append(index)
        for index in due:
            self.draws[index] = self._drawn(index)
        if due:
            self._apply(data)
        return bool(due)

    def restore(self) -> None:
        """Put the nominal model back, bit for bit. Draws are kept: what was drawn at the start applies again."""
        model = self._model()
        for name, values in self.nominal.items():
            _array(model, name)[...] = values
        self.sensing = dict(UNTOUCHED)
        self.applied = False

    def rebase(self) -> None:
        """Take the model as it is now as nominal, after the environment changed it.

        Raises ValueError while draws are in the model: `restore` comes first.
        """
        if self.applied:
            raise ValueError("the model holds random draws, which would become nominal; call restore() first")
        self.nominal = {name: _array(self._model(), name).copy() for name in self.nominal}

    # ---------------------------------------------------------------- sensing

    @property
    def observation_latency(self) -> int:
        """Control steps by which observations are late in this episode."""
        return int(self.sensing["observation_latency"])

    @property
    def action_latency(self) -> int:
        """Control steps by which actions are late in this episode."""
        return int(self.sensing["action_latency"])

    def noisy(self, vector: np.ndarray) -> np.ndarray:
        """The vector with this episode's noise, of its dtype."""
        return noisy_vector(vector, self.sensing["proprio_noise"], self._vector_rng)

    def image(self, picture: np.ndarray) -> np.ndarray:
        """The picture [H, W, C] uint8 with this episode's contrast, brightness and noise."""
        return changed_picture(picture, self.sensing, self._picture_rng)

    # ---------------------------------------------------------------- inside

    def _written(self) -> list[str]:
        names: list[str] = []
        for spec, ids in zip(self.specs, self.ids, strict=True):
            if spec.field == "texture":
                names += [f"texture.{texture}" for texture in ids]
            elif spec.field in WRITERS:
                names += WRITERS[spec.field].arrays
                names += _DERIVED if WRITERS[spec.field].constants else ()
        return sorted(set(names))

    def _draw(self, when: str) -> None:
        for index, spec in enumerate(self.specs):
            if spec.when == when:
                self.draws[index] = self._drawn(index)

    def _drawn(self, index: int) -> np.ndarray:
        """[n, numbers] new numbers for a spec, the same in each row if they are drawn together."""
        spec, count = self.specs[index], len(self.ids[index])
        rng = self._start_rng if spec.when == "start" else self.rng
        rows = 1 if spec.together else count
        if spec.field in WRITERS:
            writer = WRITERS[spec.field]
            drawn = writer.draw(spec, rows, writer.numbers, rng)
        else:
            drawn = sample(spec, (rows, 1), rng)
        return np.repeat(drawn, count, axis=0) if spec.together else drawn

    def _apply(self, data: mujoco.MjData | None) -> None:
        """Nominal values, then all present draws in the order of the specs."""
        self.restore()
        model = self._model()
        writers = []
        for index in sorted(self.draws):
            spec, drawn = self.specs[index], self.draws[index]
            try:
                if spec.field in WRITERS:
                    writers.append(WRITERS[spec.field])
                    writers[-1].apply(model, self.ids[index], spec.operation, drawn)
                else:
                    present = np.array([self.sensing[spec.field]])
                    value = within_bounds(spec.field, combine(present, spec.operation, drawn[0]))
                    self.sensing[spec.field] = float(value[0])
            except ValueError as error:
                self.restore()
                raise ValueError(f"randomization {spec}: {error}") from error
        self.applied = bool(writers)
        if any(writer.constants for writer in writers):
            _derive_constants(model)
        if data is not None and any(writer.seen for writer in writers):
            mujoco.mj_camlight(model, data)

    def _try_the_ends_of_the_ranges(self) -> None:
        """Every operation grows with its number, so what fits at both ends fits in between."""
        for end in (0, 1):
            self.draws = {
                index: np.full((len(self.ids[index]), 1), spec.range[end])
                for index, spec in enumerate(self.specs)
                if spec.field not in WRITERS or WRITERS[spec.field].numbers == 1
            }
            self._apply(None)
        self.draws = {}
        self.restore()


def _array(model: mujoco.MjModel, name: str) -> np.ndarray:
    """The model's array of that name, a view; "opt.NAME" and "texture.INDEX" too."""
    owner, _, rest = name.rpartition(".")
    if owner == "texture":
        return texture_pixels(model, int(rest))
    array: np.ndarray = getattr(model.opt if owner == "opt" else model, rest)
    return array


def _derive_constants(model: mujoco.MjModel) -> None:
    """What MuJoCo derives from the model in its reference pose, anew.

    In scratch data, since mj_setConst leaves that pose in the data that it gets. The statistics stay nominal:
    they scale the solver's tolerance and a camera's clipping planes, which are no physics, and are no arrays,
    which is what the state of an environment is captured from.
    """
    statistics = {name: getattr(model.stat, name) for name in _STATISTICS}
    centre = model.stat.center.copy()
    mujoco.mj_setConst(model, mujoco.MjData(model))
    for name, value in statistics.items():
        setattr(model.stat, name, value)
    model.stat.center[:] = centre
