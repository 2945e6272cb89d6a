"""What people see of a training while it runs: a line per epoch, a bar, pictures in TensorBoard."""

import sys
import time

import numpy as np
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.utilities.exceptions import SIGTERMException

import plots


def progress_bars() -> list[Callback]:
    """Lightning's progress bar where somebody watches."""
    return [ProgressBar()] if sys.stdout.isatty() else []


class ProgressBar(TQDMProgressBar):
    """Counts epochs from 1, and is gone when its loop is over."""

    def init_train_tqdm(self):
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def init_predict_tqdm(self):
        bar = super().init_predict_tqdm()
        bar.leave = False
        return bar

    def on_train_epoch_start(self, trainer, *rest) -> None:
        super().on_train_epoch_start(trainer, *rest)
        self.train_progress_bar.set_description(f'epoch {trainer.current_epoch + 1}')

    def get_metrics(self, trainer, module) -> dict:
        return {}  # the line of each epoch has them


class EpochLines(Callback):
    """Prints one aligned line per epoch: losses, scores at CROP_SIZE, seconds.

    `history` has a dictionary of all logged values per epoch; it is part of every checkpoint, so a
    resumed run has that of the epochs before, whatever became of metrics.csv.
    """

    def __init__(self, fold: int):
        self.fold, self.history = fold, []

    def state_dict(self) -> dict:
        return {'history': self.history}

    def load_state_dict(self, state: dict) -> None:
        self.history = list(state['history'])

    def on_train_epoch_start(self, trainer, module) -> None:
        self.start = time.monotonic()

    def on_exception(self, trainer, module, exception) -> None:
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if stopped and trainer.is_global_zero:
            score = trainer.checkpoint_callback.best_model_score
            best = 'before its first epoch ended' if score is None else f'at val_dice {score:.4f}'
            print(f'fold {self.fold} was stopped {best}; RESUME=True goes on from here', flush=True)

    def on_train_epoch_end(self, trainer, module) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values |= {'epoch': trainer.current_epoch, 'step': trainer.global_step - 1}
        self.history.append(values)
        if trainer.is_global_zero:
            shown = ('train_loss', 'val_loss', 'val_dice', 'val_iou', 'val_iou_dataset')
            scores = '  '.join(f'{name} {values[name]:.4f}' for name in shown if name in values)
            epoch = f'{trainer.current_epoch + 1:3d}/{trainer.max_epochs}'
            seconds = time.monotonic() - self.start
            line = f'fold {self.fold}  epoch {epoch}  {scores}  {seconds:6.1f} s'
            bar = trainer.progress_bar_callback
            bar.print(line) if bar else print(line, flush=True)


class Overlays(Callback):
    """Shows TensorBoard the first validation images after each epoch: truth left, prediction right."""

    def on_validation_batch_end(
        self, trainer, module, outputs, batch, batch_index, loader=0
    ) -> None:
        if batch_index or not trainer.is_global_zero:
            return
        rows = []
        for image, *masks in zip(batch['image'][:4], batch['mask'], outputs):
            image = plots.small(image.permute(1, 2, 0).cpu().numpy(), 320)
            masks = (plots.small(mask.cpu().numpy(), 320) for mask in masks)
            panels = [plots.overlay(image, mask, module.hparams.CLASSES) for mask in masks]
            rows.append(np.concatenate(panels, 1))
        trainer.logger.experiment.add_image(
            'truth and prediction', np.concatenate(rows), trainer.current_epoch, dataformats='HWC'
        )
