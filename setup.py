"""Packaging of hp-plugin; its ranges are in hp_plugin/megatron_lm/releases.json, the tests' pins in tests/."""

import ast
import json
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version, read from hp_plugin/__init__.py without importing it."""
    for node in ast.parse((ROOT / "hp_plugin" / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError("hp_plugin/__init__.py defines no __version__")


readme = ROOT / "README.md"
# Read as a file: importing the package is for when it is installed.
ranges = json.loads((ROOT / "hp_plugin" / "megatron_lm" / "releases.json").read_text("utf-8"))["ranges"]

setup(
    name="hp-plugin",
    version=version(),
    description="Attention on a grid of heads and head-dimension slices for Megatron-Core and DeepSpeed",
    long_description=readme.read_text("utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="The hp_plugin authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["hp_plugin", "hp_plugin.*"]),
    package_data={"hp_plugin": ["py.typed", "**/*.json", "**/*.patch"]},
    python_requires=ranges["python"],
    install_requires=[*(name + ranges[name] for name in ("torch", "megatron-core")), "numpy", "rich>=13"],
    extras_require={
        "test": ["hypothesis>=6.100", "mypy>=1.15", "pytest>=8", "pytest-timeout>=2.3", "ruff>=0.15", "tensorboard"],
        "plot": ["matplotlib>=3.8"],
        "deepspeed": ["deepspeed" + ranges["deepspeed"]],
    },
    entry_points={"console_scripts": ["hp-plugin = hp_plugin.commands.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
