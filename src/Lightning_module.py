"""CarvanaModel: the network, its loss, its data and its scores, as a LightningModule."""

import math
from functools import cached_property

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

import config
import dataset
import dice_loss
import folds
import masks
import metrics
import model_dispatcher
import optimizers


class NotFinite(config.UserMistake):
    """A loss is NaN or infinite."""


class CarvanaModel(pl.LightningModule):
    """A segmentation model of MODEL_NAME, trained on some folds and validated on others.

    All constants of config.py are saved in `hparams`, as plain types, and read from there. So a
    checkpoint is enough to rebuild the model, even if config.py has changed.

    Args:
        train_folds, val_folds: values of kfold in TRAIN_FOLDS.
        pretrained: whether to load ENCODER_WEIGHTS; a checkpoint brings its own weights.
        constants: values that replace those of config.py; they come from a checkpoint.
    """

    def __init__(self, train_folds, val_folds, pretrained: bool = True, **constants):
        super().__init__()
        hparams = {'train_folds': list(train_folds), 'val_folds': list(val_folds)}
        self.save_hyperparameters(hparams | {'pretrained': False} | config.constants() | constants)
        self.model = model_dispatcher.build_model(
            self.hparams.MODEL_NAME,
            weights=self.hparams.ENCODER_WEIGHTS if pretrained else None,
            channels=self.hparams.CHANNELS,
            classes=self.hparams.CLASSES,
        )
        self.model.to(memory_format=torch.channels_last)
        if config.COMPILE:  # from config.py, not from the checkpoint
            self.model.compile()
        for name in {'classes', 'ignore_index'} & self.hparams.LOSS_ARGS.keys():
            raise config.UserMistake(f'LOSS_ARGS: remove {name}; set {name.upper()} instead')
        # The rule for masks.read_mask, and the value of ignored pixels in the masks.
        self.mask_rule = tuple(self.hparams[name] for name in masks.RULE)
        self.ignored = masks.ignored_value(self.hparams.IGNORE_INDEX)
        self.loss = dice_loss.build_loss(
            self.hparams.LOSS,
            classes=self.hparams.CLASSES,
            ignore_index=self.ignored,
            **self.hparams.LOSS_ARGS,
        )
        self.scores = metrics.Scores()
        for name in ('MODEL_MEAN', 'MODEL_STD'):
            values = 255 * torch.tensor(self.hparams[name]).reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.epochs_done = 0  # of a run that is resumed
        self.recent_losses = []  # (loss, image names) of the batches not checked yet
        self.image_digests = None  # folds.digests of the images it was trained and validated on

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that the model is trained on."""
        return *config.pair(self.hparams.CROP_SIZE), self.hparams.CHANNELS

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, CLASSES, H, W) of 8-bit images (N, CHANNELS, H, W), values 0..255."""
        images = (images.float() - self.MODEL_MEAN) / self.MODEL_STD
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, CLASSES, H, W) of 8-bit images of any size, see metrics.predict_windows."""
        return metrics.predict_windows(self, images, self.input_size[:2], config.VAL_BATCH_SIZE)

    # ------------------------------------------------------------ training
    def configure_optimizers(self):
        optimizer, name = optimizers.build_optimizer(self), self.hparams.SCHEDULE
        if name is None:
            return optimizer
        schedule = optimizers.build_schedule(
            name, optimizer, int(self.trainer.estimated_stepping_batches)
        )
        when = {'interval': 'step'}
        if name == 'plateau':
            # Step at the epoch's last batch: interval 'epoch' steps after the checkpoint is saved.
            when |= {'frequency': self.trainer.num_training_batches, 'monitor': 'val_dice'}
        return [optimizer], [{'scheduler': schedule, 'strict': False, **when}]

    def optimizer_step(self, *args, **kwargs) -> None:
        scaler = getattr(self.trainer.precision_plugin, 'scaler', None)
        scale = scaler.get_scale() if scaler else 0
        super().optimizer_step(*args, **kwargs)
        # The GradScaler lowers its scale when it skips a step.
        self.step_skipped = scaler is not None and scaler.get_scale() < scale

    def lr_scheduler_step(self, schedule, metric) -> None:
        if metric is not None or not self.step_skipped:
            super().lr_scheduler_step(schedule, metric)

    def on_fit_start(self) -> None:
        self.image_digests = folds.digests(self.hparams.val_folds[0])

    def on_train_epoch_start(self) -> None:
        self.log('lr', self.optimizers().param_groups[0]['lr'], sync_dist=True)

    def on_train_batch_start(self, batch: dict, batch_index: int) -> None:
        # Seed dropout by the epoch, so that a resumed run repeats it. This is after Lightning's
        # own random draws at the start of an epoch, which differ in a resumed run.
        if batch_index == 0:
            torch.manual_seed(self.hparams.SEED + 1000 * self.current_epoch + self.global_rank)

    def training_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        loss = self.loss(self(batch['image']), batch['mask'])
        size = len(batch['img'])
        self.log('train_loss', loss, batch_size=size, on_step=False, on_epoch=True, sync_dist=True)
        self.recent_losses.append((loss.detach(), batch['img']))
        if len(self.recent_losses) == self.trainer.log_every_n_steps:
            self.check_losses()
        # The last accumulation window of an epoch can be shorter, but Lightning still divides by
        # the full length. Scale the loss up to correct it.
        window, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        short = batches % window
        return loss * (window / short) if batch_index >= batches - short else loss

    def check_losses(self) -> None:
        """Raise NotFinite for a loss that is not finite.

        It checks several batches at a time, because each check waits for the device. If the
        GradScaler skips a step, the loss is finite, and nothing is raised.
        """
        if not self.recent_losses:
            return
        losses, names = zip(*self.recent_losses)
        self.recent_losses = []
        for loss, batch in zip(torch.stack(losses).tolist(), names):
            self.check_finite(loss, 'the loss', f' at the images {", ".join(batch)}')

    def check_finite(self, loss: float, name: str, where: str = '') -> None:
        if not math.isfinite(loss):
            advice = f'a lower LR than {self.hparams.LR}'
            if self.trainer.precision == '16-mixed':
                advice = f"PRECISION='bf16' (or 32) instead of 16, or {advice}"
            raise NotFinite(
                f'{name} is {loss} in epoch {self.current_epoch + 1}{where}: run again with '
                f'RESUME=True and {advice}; it resumes from the last good checkpoint, if any'
            )

    # ------------------------------------------------------------ validation
    def on_validation_start(self) -> None:
        self.check_losses()
        self.share_buffers()
        names = self.trainer.val_dataloaders.dataset.names
        self.row = {name: row for row, name in enumerate(names)}

    def on_validation_epoch_start(self) -> None:
        self.share_buffers()  # now that EMA has swapped in the average

    def share_buffers(self) -> None:
        """Each rank has its own batch norm statistics. Checkpoints hold those of rank 0."""
        for buffer in self.model.buffers() if self.trainer.world_size > 1 else ():
            torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        """Returns the predicted class indices, uint8 (N, H, W)."""
        logits = self.predict(batch['image'])
        prediction = metrics.decide(metrics.activate(logits))
        counts = metrics.count(prediction, batch['mask'], self.hparams.CLASSES, self.ignored)
        rows = torch.tensor([self.row[name] for name in batch['img']], device=self.device)
        self.scores.update(rows, counts, self.loss(logits, batch['mask']))
        return prediction

    def on_validation_epoch_end(self) -> None:
        scores = self.scores.compute()
        self.scores.reset()
        self.check_finite(scores['val_loss'].item(), 'val_loss')
        self.log_dict(scores, sync_dist=True)

    # ------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint['image_digests'] = self.image_digests

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.image_digests = checkpoint.get('image_digests')
        self.epochs_done = checkpoint.get('epoch', -1) + 1
        # After a stop by NaN, a run may go on with another LR.
        factor = self.hparams.LR / checkpoint['hyper_parameters']['LR']
        if factor != 1:
            optimizers.scale_rates(
                [checkpoint['optimizer_states'], checkpoint['lr_schedulers']], factor
            )

    # ------------------------------------------------------------ data
    @cached_property
    def train_data(self) -> dataset.CarvanaDataset:
        """Kept, because with SCALE it reads the headers of all images."""
        return dataset.CarvanaDataset(self.hparams.train_folds, train=True)

    def train_dataloader(self) -> DataLoader:
        data, batch_size = self.train_data, self.hparams.TRAIN_BATCH_SIZE
        sampler = dataset.EpochSampler(data, *self.ranks(), shuffle=True, seed=self.hparams.SEED)
        # Workers prefetch the first items before Lightning sets a resumed run's epoch.
        sampler.set_epoch(self.epochs_done)
        # Batch norm cannot average over a last batch of one image.
        drop_last = batch_size > 1 and len(sampler) % batch_size == 1
        return self.build_loader(sampler, batch_size, drop_last)

    def val_dataloader(self) -> DataLoader:
        data = dataset.CarvanaDataset(self.hparams.val_folds, train=False)
        sampler = DistributedSampler(data, *self.ranks(), shuffle=False)
        # With SCALE, images have sizes of their own.
        batch_size = self.hparams.VAL_BATCH_SIZE if self.hparams.SCALE is None else 1
        return self.build_loader(sampler, batch_size)

    def ranks(self) -> tuple[int, int]:
        """(number of processes, this one's rank); (1, 0) without a Trainer."""
        return (self.trainer.world_size, self.trainer.global_rank) if self._trainer else (1, 0)

    def build_loader(self, sampler, batch_size: int, drop_last: bool = False) -> DataLoader:
        workers = self.hparams.NUM_WORKERS
        return DataLoader(
            sampler.dataset,
            batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=dataset.collate,
            num_workers=workers,
            pin_memory=self.device.type == 'cuda',
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
        )
