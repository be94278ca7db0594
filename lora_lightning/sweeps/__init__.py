"""Execution of the jobs of a sweep.

The package imports hydra and the standard library, and rich for display.
"""


def register() -> None:
    """Register the launchers with Hydra.

    Hydra finds plugins by itself only if this package is not installed in editable mode.
    """
    from hydra.core.plugins import Plugins

    from .launcher import ProcessLauncher
    from .packed_launcher import PackedLauncher

    for launcher in (ProcessLauncher, PackedLauncher):
        Plugins.instance().register(launcher)
