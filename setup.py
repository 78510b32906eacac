"""What pyproject.toml cannot say: a wheel carries conf/ as repro/conf; a checkout and an editable install read it where it stands."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Copies conf/ beside the modules of a built wheel."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("conf", Path(self.build_lib) / "repro" / "conf", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConf})
