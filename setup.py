"""Installation: `make setup`, or by hand `pip install -e .[all,dev]`.

Ranges stand here, the tested versions in constraints.txt. torch 2.10 is the newest PyPI release
that carries V100 (sm_70) kernels, so constraints.txt pins it; newer ones work on newer GPUs.
"""

from setuptools import find_packages, setup

# What some commands need; `ibeton.command.EXTRAS` names the extra where a package is missing.
EXTRAS = {
    "timm": ["timm>=1.0"],  # Swin backbones, fine-tuning, weights for timm
    "plots": ["matplotlib>=3.9"],
    "cluster": ["scikit-learn>=1.5", "scipy>=1.13"],  # also --eval-every, and DAVIS
    "export": ["timm>=1.0", "transformers>=5"],  # weights for Hugging Face
    # UperNet's head, and COCO's average precision
    "dense": ["timm>=1.0", "transformers>=5", "faster-coco-eval>=1.8"],
    "dali": ["nvidia-dali-cuda120>=2.0; platform_system == 'Linux'"],
    "trackers": ["wandb>=0.19", "mlflow-skinny>=2.20"],  # that --log-to names
}

setup(
    name="ibeton",
    version="0.1.0",
    description="Fast, exact pre-training of iBOT vision backbones on the machines people have",
    license="MIT",
    python_requires=">=3.10,<3.14",
    # ibeton/ links to pipeline/, model/, training/, evaluation/, benchmarks/ and train.py, so that
    # one name is installed and a checkout works without installation.
    packages=find_packages(include=["ibeton*"]),
    entry_points={"console_scripts": ["ibeton = ibeton.__main__:main"]},
    install_requires=[
        *("torch>=2.8", "torchvision>=0.23", "numpy>=2.0", "numba>=0.61", "pillow>=11"),
        *("rich>=13", "tensorboard>=2.17", "safetensors>=0.5"),
    ],
    extras_require={
        **EXTRAS,
        "all": sorted({package for packages in EXTRAS.values() for package in packages}),
        # ffcv builds against OpenCV and libturbojpeg and imports distutils, which setuptools
        # supplies from Python 3.12 on.
        "ffcv": ["ffcv==1.0.2", "setuptools<81"],
        # vos-benchmark: what J&F of videos is held against.
        "dev": [
            *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.6", "mypy>=1.11"),
            "vos-benchmark>=0.1",
        ],
    },
)
