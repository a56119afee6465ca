"""Whole networks with fused blocks on a GPU: logits, graphs, compilation, streams, training."""

import copy

import pytest
import torch

import convfirst_kernels as ck

timm = pytest.importorskip("timm")
pytest.importorskip("convfirst.models")

pytestmark = pytest.mark.gpu
NETWORKS = {
    "convfirst_tiny": {},
    "convfirst_tiny-batchnorm": {"norm": "batchnorm"},
    "convnext_tiny": {},
}
SMALL_NETWORKS = {"convfirst_atto": {}, "convfirst_atto-batchnorm": {"norm": "batchnorm"}, "convnext_atto": {}}
IMAGES = 1024
CLASSES = 100


def build(name: str, options: dict, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    """A network with weights that let its blocks matter, of ``dtype``, in evaluation mode."""
    torch.manual_seed(seed)
    model = timm.create_model(name.split("-")[0], num_classes=CLASSES, ls_init_value=0.5, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        # Truncated normal 0.02 makes a network that hardly sees its image. Batch norms in evaluation mode let it
        # grow: activations times 4 come near float16's largest number, which PyTorch's own exceed in some draws.
        factor = 3.5 if options.get("norm") == "batchnorm" else 4
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model.to("cuda", dtype, memory_format=torch.channels_last).eval()


def pictures(count: int, side: int, seed: int) -> torch.Tensor:
    """Random images with structure at every scale."""
    generator = torch.Generator("cuda").manual_seed(seed)
    image = torch.zeros(count, 3, side, side, device="cuda")
    for scale in (4, 16, 64, side):
        noise = torch.randn(count, 3, scale, scale, generator=generator, device="cuda")
        image += torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear")
    return image.contiguous(memory_format=torch.channels_last)


def pictures_of_classes(count: int, side: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of CLASSES classes: four parts of the class's own picture, one part of another."""
    labels = torch.arange(count, device="cuda") % CLASSES
    own, other = pictures(CLASSES, side, seed=1)[labels], pictures(count, side, seed)
    return (0.8**0.5 * own + 0.2**0.5 * other).contiguous(memory_format=torch.channels_last), labels


@torch.no_grad()
def give_margins(model: torch.nn.Module, dtype: torch.dtype, seed: int) -> None:
    """Make the head the nearest class mean of the float32 network's features.

    Random heads leave so many near-ties among their classes that PyTorch's own 16-bit path misses 99.9 %; a trained
    network has margins, and so does this.
    """
    images, labels = pictures_of_classes(4 * CLASSES, 224, seed)
    wide = copy.deepcopy(model).float()
    parts = images.to(dtype).float().split(CLASSES)
    features = torch.cat([wide.forward_head(wide.forward_features(part), pre_logits=True) for part in parts])
    means = torch.stack([features[labels == label].mean(0) for label in range(CLASSES)])
    centred = means - means.mean(0)
    classifier = model.get_classifier()
    classifier.weight.copy_(centred)
    classifier.bias.copy_(-(centred * (means + means.mean(0))).sum(1) / 2)


@torch.no_grad()
def logits(model: torch.nn.Module, images: torch.Tensor, batch: int = 128) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return torch.cat([model(part.to(dtype)).float() for part in images.split(batch)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits(name, dtype, seed, monkeypatch):
    """Within twice the error of PyTorch's own 16 bits, beside the float32 network and that of the rounded weights.

    Twice both its root mean square and its largest. Folded batch norms make other weights and round those, where
    PyTorch's path has nothing more to round; so beside rounded weights, and there alone, the largest of their errors,
    which came as far as 1.98 times PyTorch's in 70 draws, may be 2.5 times it.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # eager is compared with itself bit by bit
    unrounded = build(name, NETWORKS[name], torch.float32, seed)
    give_margins(unrounded, dtype, seed + 1)
    model = copy.deepcopy(unrounded).to(dtype)
    images, _ = pictures_of_classes(IMAGES, 224, seed + 2)
    images = images.to(dtype).float()
    rounded = logits(copy.deepcopy(model).float(), images)
    truth = logits(unrounded, images)
    eager = logits(model, images)
    report = ck.accelerate(model, kernels="required")
    assert not report.skipped
    fused = logits(model, images)
    report.undo()
    torch.testing.assert_close(logits(model, images[:128]), eager[:128], rtol=0, atol=0, equal_nan=True)
    finite = eager.isfinite().all(1)  # an image in thousands overflows float16 in PyTorch, whose error is the bound
    assert finite.float().mean() >= 0.999
    fused, truth, rounded, eager = fused[finite], truth[finite], rounded[finite], eager[finite]
    rounded_factor = 2.5 if NETWORKS[name].get("norm") == "batchnorm" else 2
    for beside, wide, factor in (("float32", truth, 2), ("rounded weights", rounded, rounded_factor)):
        error, eager_error = (fused - wide).abs().max(), (eager - wide).abs().max()
        assert error <= factor * eager_error, f"{beside}: logits off by {error:.4g}, eager by {eager_error:.4g}"
        rms, eager_rms = (fused - wide).square().mean().sqrt(), (eager - wide).square().mean().sqrt()
        assert rms <= 2 * eager_rms, f"{beside}: root mean square {rms:.4g}, eager's {eager_rms:.4g}"
    same, eager_same = (float((y.argmax(1) == rounded.argmax(1)).float().mean()) for y in (fused, eager))
    # In bfloat16 PyTorch's own path misses 99.9 % of so few images now and then.
    floor = 0.999 if dtype == torch.float16 else min(0.999, eager_same)
    assert same >= floor, f"argmax agrees on {same:.4f}, eager's on {eager_same:.4f}"


@pytest.mark.parametrize("name", SMALL_NETWORKS)
class TestSmall:
    @pytest.fixture
    def network(self, name, seed):
        model = build(name, SMALL_NETWORKS[name], torch.float16, seed)
        ck.accelerate(model, kernels="required")
        images = pictures(4, 97, seed).half()
        with torch.no_grad():
            yield model, images, model(images)

    def test_cuda_graph(self, network):
        model, images, expected = network
        static = torch.zeros_like(images)
        model(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(static)
        static.copy_(images)
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=0, atol=0)

    def test_side_stream(self, network):
        model, images, expected = network
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = model(images)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_compile(self, network, frozen):
        model, images, expected = network
        ck.accelerate(model, kernels="required", frozen=frozen)
        model(images)
        y = torch.compile(model, fullgraph=True)(images)
        wide = copy.deepcopy(model).float()
        ck.accelerate(wide, kernels="off")
        truth = wide(images.float())
        assert (y - truth).abs().max() <= 2 * (expected - truth).abs().max() + 1e-3 * truth.abs().max()

    def test_weights_may_change(self, network):
        model, images, expected = network
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        changed = model(images)
        ck.accelerate(model, kernels="off")
        eager = model(images)
        assert (changed - eager).abs().max() < 0.1 * (expected - eager).abs().max()


def test_training_step(seed):
    """A step under autocast: loss and gradients near those of the plain network."""
    model = build("convfirst_atto", {"drop_path_rate": 0.0}, torch.float32, seed).train()
    images, labels = pictures(8, 64, seed), torch.randint(0, CLASSES, (8,), device="cuda")

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, gradient = step()
    ck.accelerate(model, kernels="required")
    fused_loss, fused_gradient = step()
    assert abs(fused_loss - loss) < 0.05 * abs(loss)
    assert torch.nn.functional.cosine_similarity(fused_gradient, gradient, dim=0) > 0.99
