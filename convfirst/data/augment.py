"""The augmentation that a run uses: one flat record that every data source reads (`configs/augment/`)."""

from dataclasses import dataclass

from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing


@dataclass(frozen=True)
class Augment:
    """Augmentation of the training images and preprocessing of the evaluation images; the defaults switch all off.

    Names and meanings are those of timm's `create_transform`, `Mixup` and `RandomErasing`.

    Attributes:
        auto_augment: timm's policy string, e.g. "rand-m9-mstd0.5-inc1" (RandAugment).
        hflip: probability of a horizontal flip.
        scale, ratio: area and aspect range of the random resized crop; `scale=None` resizes and crops the centre.
        interpolation: of the training crop: nearest, bilinear, bicubic, lanczos or random.
        color_jitter: brightness, contrast and saturation range; without effect beside `auto_augment`, as in timm.
        rotate, translate, zoom: random affine map of the `digits` source: degrees, share of the side, share of size.
        reprob, remode, recount: random erasing: probability, fill (const, rand or pixel), largest number of boxes.
        mixup, cutmix: alpha of each; 0 is off. `mixup_prob`: share of batches mixed. `mixup_switch_prob`: share of
            those that are cut when both are on. `mixup_mode`: one draw a batch, pair or elem.
        label_smoothing: share of the target spread over all classes.
        repeats: copies of an image in an epoch of unchanged length (repeated augmentation); 1 is off.
        test_size: evaluation side in pixels; None takes the training size that the run starts with.
        crop_pct: share of the resized side that the centre crop of the evaluation keeps.
        test_interpolation: of the evaluation resize.
    """

    auto_augment: str | None = None
    hflip: float = 0.0
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    interpolation: str = "bicubic"
    color_jitter: float = 0.0
    rotate: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    reprob: float = 0.0
    remode: str = "const"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    label_smoothing: float = 0.0
    repeats: int = 1
    test_size: int | None = None
    crop_pct: float = 0.875
    test_interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob", "label_smoothing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"augment.{name}={getattr(self, name)} must lie between 0 and 1")
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"augment.crop_pct={self.crop_pct} must lie above 0 and at most at 1")
        for name, choices in {
            "remode": ("const", "rand", "pixel"),
            "mixup_mode": ("batch", "pair", "elem"),
            "interpolation": ("nearest", "bilinear", "bicubic", "lanczos", "random"),
            "test_interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"augment.{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        if self.repeats < 1:
            raise ValueError(f"augment.repeats={self.repeats} must be at least 1")
        for name in ("scale", "ratio"):  # Hydra hands over its own list type
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))

    def evaluation(self) -> "Augment":
        """The evaluation's part of it, without any augmentation."""
        return Augment(test_size=self.test_size, crop_pct=self.crop_pct, test_interpolation=self.test_interpolation)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    def refuse(self, source: str, *names: str, advice: str = "leave it off") -> None:
        """Raise ValueError if one of the fields `names`, which `source` can't honour, is switched on."""
        for name in names:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"augment.{name}={value!r} isn't available with data={source}: {advice}")

    def make_mixup(self, num_classes: int) -> Mixup | None:
        """timm's mixup/cutmix for [B, C, H, W] images and int64 [B] targets, or None if both are off."""
        if not self.mixes:
            return None
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            mode=self.mixup_mode,
            label_smoothing=self.label_smoothing,
            num_classes=num_classes,
        )

    def make_erasing(self, device: str) -> RandomErasing | None:
        """timm's random erasing for normalised [B, C, H, W] batches on `device`, or None if it is off."""
        if self.reprob == 0:
            return None
        return RandomErasing(self.reprob, mode=self.remode, max_count=self.recount, device=device)
