"""Builds `clinfast._C` with CMake. Needs a C++17 compiler; neither torch nor a GPU."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", str(ROOT), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]  # fmt: skip
        subprocess.run(configure + os.environ.get("CMAKE_ARGS", "").split(), cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--target", "_C"], cwd=build, check=True)


setup(ext_modules=[Extension("clinfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
