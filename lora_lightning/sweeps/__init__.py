"""How the jobs of a sweep are run. Imports hydra and the standard library; rich to show it."""


def register() -> None:
    """Makes the launchers known to Hydra.

    It finds plugins by itself only where this package is not installed editable.
    """
    from hydra.core.plugins import Plugins

    from .launcher import ProcessLauncher
    from .packed_launcher import PackedLauncher

    for launcher in (ProcessLauncher, PackedLauncher):
        Plugins.instance().register(launcher)
