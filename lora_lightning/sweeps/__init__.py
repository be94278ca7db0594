"""Sweeps: launchers and queue of their jobs, successive halving, and reports.

Nothing here imports torch when a sweep starts, except `packed` and the count of GPUs.
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
