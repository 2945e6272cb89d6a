"""190 real microscope images, none in Carvana's layout: by overrides alone. Skipped where absent."""

import pytest

import command_line
import config
import folds
from dataset import CarvanaDataset

NUCLEI = config.path('../shared/data/nuclei')


@pytest.mark.skipif(not NUCLEI.is_dir(), reason='the nuclei are not beside the project')
def test_nuclei_by_overrides_alone(tmp_path):
    command_line.override(
        [
            f'TRAIN_PATH={NUCLEI}/images',
            f'MASK_PATH={NUCLEI}/masks',
            f'OUTPUT={tmp_path}',
            'IMAGE_SUFFIX=.png',
            'MASK_SUFFIX=.png',
            'GROUP_REGEX=None',
            'CROP_SIZE=256',
        ]
    )
    folds.main()
    data = CarvanaDataset([0])
    assert len(data) == 38
    for index in range(0, 38, 5):
        item = data[index]
        assert item['image'].shape == (3, 256, 256)
        assert set(item['mask'].unique().tolist()) == {0, 1}
        assert 0.005 < item['mask'].float().mean() < 0.9
