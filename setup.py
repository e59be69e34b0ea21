from setuptools import find_packages, setup

# The folder kernels/ is imported as `minitune_kernels`: the bare name `kernels` belongs to a Hugging Face
# package that transformers imports. Without an __init__.py in it, that package still wins when Python runs here.
setup(
    name="minitune",
    version="0.1.0",
    description="LoRA and QLoRA fine-tuning of Llama, Mistral and Phi models in raw PyTorch, written to be read",
    license="Apache-2.0",
    packages=[*find_packages(include=["minitune", "minitune.*"]), "minitune_kernels"],
    package_dir={"minitune_kernels": "kernels"},
    package_data={
        "minitune": ["embedded/*/*", "*.html", "reports/*.html"],
        "minitune_kernels": ["*.c", "*.h", "*.cu", "cubin/*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5",
        "safetensors",  # weights and adapters
        "sentencepiece",  # tokenizer.model of Llama and Mistral
        "tokenizers",  # tokenizer.json of Phi and Llama 3
        "huggingface-hub>=1",  # downloads: its cache, token and HTTP client
        "filelock",  # one process a run folder; huggingface-hub needs it anyway
        "numpy",  # the study's split, random bits
        "nltk",  # Porter stemmer of ROUGE-L
        "regex",  # Unicode classes of a BLEU tokeniser; nltk needs it anyway
        "scipy",  # bootstrap intervals
        "tqdm",  # progress bars
        "matplotlib",  # curves.png
    ],
    extras_require={
        # The peers that the tests compare against; minitune itself never imports them.
        "test": [
            "pytest",
            "pytest-xdist",  # `make test` runs one process a core: three quarters of the time is Python
            "transformers>=5",
            "peft>=0.17",
            "bitsandbytes>=0.46",
            "sacrebleu",
            "rouge-score",
            "bert-score",
            "hypothesis",
            'triton>=3.5; sys_platform == "linux"',  # its interpreter and its compiler work without a GPU
            'nvidia-cuda-nvrtc-cu12>=12.6; sys_platform == "linux"',  # builds nf4.cu; CUDA 13 lacks the V100
        ],
        "lint": ["ruff"],
    },
)
