from types import SimpleNamespace

import pytest
import torch

from convfirst.training import TrainLog, train_log


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class Rows(list):
    def log_metrics(self, metrics, step):
        self.append(metrics)


@pytest.mark.parametrize("saving", [0.0, 100.0])
def test_writing_a_checkpoint_counts_neither_as_work_nor_as_waiting(monkeypatch, saving):
    """Two updates of 4 images, each of them a second of waiting and three of work, with a save in between."""
    clock, rows = Clock(), Rows()
    monkeypatch.setattr(train_log, "time", clock)
    epoch_loop = SimpleNamespace(_should_accumulate=lambda: False)
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
        loggers=[rows],
        log_every_n_steps=2,
        current_epoch=0,
        is_last_batch=False,
        precision="32-true",
        world_size=1,
    )
    module = SimpleNamespace(device=torch.device("cpu"))
    batch, outputs = (torch.zeros(4, 1, 8, 8), None), {"loss": torch.ones(())}
    log = TrainLog()
    log._flops = 1.0  # of a pixel
    log.on_fit_start(trainer, module)
    log.on_train_start(trainer, module)
    for step in (1, 2):
        trainer.global_step = step
        clock.now += 1
        log.on_train_batch_start(trainer, module, batch, step - 1)
        clock.now += 3
        log.on_train_batch_end(trainer, module, outputs, batch, step - 1)
        if saving:
            log.on_save_checkpoint(trainer, module, {})
            clock.now += saving - 1  # the next batch is waited for in the last second of the save
    (row,) = rows
    waited = 2 - (saving > 0)  # a wait that begins with a save isn't told apart from it
    assert row["speed/images_per_s"] == pytest.approx(8 / (6 + waited))
    assert row["speed/data_wait"] == pytest.approx(waited / (6 + waited))
    assert log.images_per_s() == pytest.approx(row["speed/images_per_s"])
