"""What README and the compose file say of the image is what the Dockerfile, the lock files and the results say."""

import json
import re
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_readme_builds_an_image_that_knows_its_commit():
    command = re.search(r"^docker build .*?[^\\\\]\n", README, re.DOTALL | re.MULTILINE)[0]
    dockerfile = (REPOSITORY / "docker/Dockerfile").read_text()
    unknown = re.findall(r"^ARG (\w+)=unknown$", dockerfile, re.MULTILINE)
    assert unknown == ["GIT_COMMIT", "KERNELS_TREE"]
    for argument in ("BASE_IMAGE", *unknown):
        assert f"--build-arg {argument}=" in command


def test_readme_names_the_torch_of_the_lock_files_and_of_the_gpu_results():
    files = [REPOSITORY / "docker/requirements.txt", REPOSITORY / "constraints.txt"]
    locked = {re.search(r"^torch==(\S+)", path.read_text(), re.MULTILINE)[1] for path in files}
    results = [json.loads(path.read_text()) for path in (REPOSITORY / "results").glob("*.json")]
    measured = {result["versions"]["torch"] for result in results if "NVIDIA" in result["device"]}
    assert len(locked) == len(measured) == 1, (locked, measured)
    said = f"have torch {locked.pop()}; every GPU result in this repository is from torch {measured.pop()}."
    assert said in README


def test_compose_hands_on_the_key_of_weights_and_biases():
    service = yaml.safe_load((REPOSITORY / "docker/compose.yaml").read_text())["services"]["train"]
    assert "WANDB_API_KEY" in service["environment"]
