"""`pip install -e .` for a version range of every dependency; the launch scripts install the exact ones of launch/locks/."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="llama4-jax",
    version="0.1.0",
    description="Llama 4 in JAX and Flax: pretrain it, study it, run it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["llama4_jax*", "pallas_kernels*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "array_record>=0.8; sys_platform != 'win32'",
        "fsspec>=2024.6",
        "numpy>=2.0",
        "absl-py>=2.1",
        "jaxtyping>=0.3",
        "tokenizers>=0.21",
        "jinja2>=3.1.6",
        "pillow>=11",
        "safetensors>=0.5",
        "matplotlib>=3.8",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "data": ["pyarrow>=15", "zstandard>=0.22"],
        "cloud": ["gcsfs>=2024.6", "s3fs>=2024.6", "huggingface_hub>=0.30"],
        "llama-tokenizer": ["llama-models>=0.3"],
        "video": ["av>=14"],
        "hub": ["huggingface_hub>=0.30"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "beartype>=0.18",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "pyarrow>=15",
            "zstandard>=0.22",
            "av>=14",
        ],
        "parity": ["torch>=2.6", "transformers>=5.20"],
        "dev": ["ruff>=0.12"],
    },
)
