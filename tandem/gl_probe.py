"""Draws one MuJoCo frame with the back end that MUJOCO_GL names and prints who drew it.

`tandem doctor` runs this as a program of its own: a graphics library that hangs or crashes must not take the doctor
with it, and a process can use one back end only.
"""

from __future__ import annotations

import importlib
import os
import sys

SCENE = "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='.5'/></worldbody></mujoco>"


def main() -> int:
    """Exit code 0 and the renderer's name, or 1 and the reason."""
    try:
        import mujoco

        # Where the library is missing, mujoco only lacks a name; its back end's own module says why.
        importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}")
        model = mujoco.MjModel.from_xml_string(SCENE)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        with mujoco.Renderer(model, 64, 64) as renderer:
            renderer.update_scene(data)
            bright = renderer.render().max()
            from OpenGL import GL  # only now: it must find the context that mujoco made

            name = GL.glGetString(GL.GL_RENDERER)
    except Exception as error:  # whatever the library raises is the answer
        print(" ".join(str(error).split()) or type(error).__name__)
        return 1
    if bright == 0:
        print("the frame is black")
        return 1
    print(name.decode() if name else "unnamed renderer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
