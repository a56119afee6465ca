"""compile_for_inference: what it refuses, and that a captured network gives the plain one's logits for every batch."""

import copy

import pytest
import torch

import convfirst_kernels as ck

timm = pytest.importorskip("timm")
pytest.importorskip("convfirst.models")


def network(device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("convfirst_atto", num_classes=10, ls_init_value=0.5)
    return model.to(device, dtype, memory_format=torch.channels_last).eval()


def test_needs_a_gpu():
    with pytest.raises(ValueError, match="example is on cpu; CUDA graphs need a CUDA device"):
        ck.compile_for_inference(network("cpu"), torch.randn(2, 3, 64, 64))


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"example has shape \[3, 64, 64\]; expected \[N, channels, height, width\]"):
        ck.compile_for_inference(network("cpu"), torch.randn(3, 64, 64))


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("outside", ["inductor", "eager"])
    def test_any_batch(self, outside, seed):
        model = network("cuda", torch.float16)
        before = copy.deepcopy(model.state_dict())
        generator = torch.Generator("cuda").manual_seed(seed)
        images = torch.randn(8, 3, 64, 64, device="cuda", generator=generator).half()
        fast = ck.compile_for_inference(model, images, batches=(2,), kernels="required", outside=outside)
        assert fast.batches == (2, 8) and not fast.report.skipped
        wide = copy.deepcopy(model).float()
        results = []
        with torch.no_grad():
            for count in (8, 1, 2, 5):
                x = torch.randn(count, 3, 64, 64, device="cuda", generator=generator).half()
                results.append((fast(x), model(x), wide(x.float())))
        for fused, eager, truth in results:  # kept: a later call must not write into an earlier result
            bound = 2 * (eager - truth).abs().max() + 2e-3 * truth.abs().max()
            assert fused.shape == truth.shape and (fused - truth).abs().max() <= bound
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert "forward" not in model.stages[0].blocks[0].__dict__

    def test_refusals(self):
        model = network("cuda", torch.float16)
        example = torch.zeros(4, 3, 64, 64, device="cuda", dtype=torch.float16)
        with pytest.raises(ValueError, match=r"batches has \[5\]; accepted are sizes from 1 to the example's 4"):
            ck.compile_for_inference(model, example, batches=(5,))
        with pytest.raises(ValueError, match="the model is torch.float16 on cuda:0, the example torch.float32"):
            ck.compile_for_inference(model, example.float())
        fast = ck.compile_for_inference(model, example, outside="eager")
        with pytest.raises(ValueError, match=r"x has shape \[5, 3, 64, 64\]; compiled for \[1 to 4, 3, 64, 64\]"):
            fast(torch.zeros(5, 3, 64, 64, device="cuda", dtype=torch.float16))
        with pytest.raises(ValueError, match="x is torch.float32 on cuda:0; compiled for torch.float16"):
            fast(example.float())
