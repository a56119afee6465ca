"""Data sources: one LightningDataModule each."""

from convfirst.data.augment import Augment
from convfirst.data.datamodule import ImageDataModule, TrainLoader
from convfirst.data.digits import DigitsDataModule
from convfirst.data.ffcv import FFCVDataModule
from convfirst.data.hugging_face import HuggingFaceDataModule
from convfirst.data.image_folder import ImageFolderDataModule
from convfirst.data.image_tree import BadImageError
from convfirst.data.synthetic import SyntheticDataModule
from convfirst.data.webdataset import WebDatasetDataModule

__all__ = [
    "Augment",
    "BadImageError",
    "DigitsDataModule",
    "FFCVDataModule",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "SyntheticDataModule",
    "TrainLoader",
    "WebDatasetDataModule",
]
