"""Encoders, decoders, weights files, and CarvanaModel by itself; nothing is downloaded."""

import pickle

import pytest
import safetensors.torch
import torch
from conftest import SRC, Evil, run_script, settings
from segmentation_models_pytorch.encoders import get_encoder

import command_line
import config
import encoders
import model_dispatcher
from Lightning_module import CarvanaModel

ORIGINALS = [
    'smp_unet_resnet34',
    'smp_unet_resnet50',
    'smp_unet_resnext50_32x4d',
    'smp_unet_se_resnext50_32x4d',
    'smp_unet_efficientnet-b4',
    'smp_unet_efficientnet-b7',
    'smp_unet_timm-efficientnet-b5',
]


@pytest.mark.parametrize('name', ORIGINALS)
def test_the_originals_names_are_there(name):
    assert callable(model_dispatcher.MODELS[name])


@pytest.mark.parametrize(
    ('name', 'classes'),
    [(ORIGINALS[0], 1), (ORIGINALS[3], 1), (ORIGINALS[6], 1), ('smp_fpn_tu-resnet18', 3)],
)
def test_models_end_in_logits(name, classes):
    model = model_dispatcher.build_model(name, classes=classes).eval()
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, classes, 64, 64)
    assert logits.min() < 0


def test_each_build_is_a_fresh_model():
    first, second = (model_dispatcher.build_model('smp_unet_resnet18') for _ in range(2))
    assert first is not second
    assert not torch.equal(first.encoder.conv1.weight, second.encoder.conv1.weight)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('unet_resnet34', 'smp_<decoder>_<encoder>'),
        ('smp_unet', 'smp_<decoder>_<encoder>'),
        ('smp_unt_resnet34', 'did you mean unet'),
        ('smp_unet_resnet35', 'resnet34'),
        ('smp_unet_tu-convnext_tinny', 'tu-convnext_tiny'),
    ],
)
def test_unknown_names_are_told_the_nearest(name, message):
    with pytest.raises(config.UserMistake, match=message):
        model_dispatcher.build_model(name)


def test_a_pair_that_cannot_be_built_is_refused_with_the_reason():
    with pytest.raises(config.UserMistake, match=r'smp_dpt_resnet18: .*built on resnet18 \(.+\)'):
        model_dispatcher.build_model('smp_dpt_resnet18')


def test_unknown_weights_are_told_the_legal_ones():
    with pytest.raises(config.UserMistake, match='imagenet'):
        model_dispatcher.build_model('smp_unet_resnet18', weights='imagenet22k')


def test_without_a_connection_the_message_says_what_to_set(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError('no route to the hub')

    monkeypatch.setattr('segmentation_models_pytorch.encoders.hf_hub_download', refuse)
    with pytest.raises(config.UserMistake, match='no route to the hub.*weights file.*None'):
        model_dispatcher.build_model('smp_unet_resnet18', weights='imagenet')


def test_a_wrong_proxy_is_told_and_not_the_model(tmp_path):
    """The hub's client does not take the scheme: another type of error than without a network."""
    proxy = {'ALL_PROXY': 'socks://127.0.0.1:9', 'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '0'}
    words = ['MODEL_NAME=smp_linknet_resnet18', 'ENCODER_WEIGHTS=imagenet']
    code = 'import sys, config, command_line, model_dispatcher as m\n'
    code += 'command_line.run(lambda: m.build_model(config.MODEL_NAME, config.ENCODER_WEIGHTS), "")'
    script = tmp_path / 'build.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(SRC)!r})\n{code}')
    result = run_script(script, *words, variables=proxy)
    assert result.returncode == 1 and 'cannot be built' not in result.stderr
    assert 'the weights of resnet18 could not be downloaded, with the proxy that' in result.stderr
    assert 'ALL_PROXY' in result.stderr and 'set a weights file' in result.stderr


def test_grey_images_get_the_sum_of_the_first_layer(tmp_path, capsys):
    donor = get_encoder('resnet18')
    torch.save(donor.state_dict(), tmp_path / 'w.pth')
    model = model_dispatcher.build_model('smp_unet_resnet18', str(tmp_path / 'w.pth'), channels=1)
    assert torch.equal(model.encoder.conv1.weight, donor.conv1.weight.sum(1, keepdim=True))
    told = capsys.readouterr().out
    assert '100 of 100 encoder tensors' in told and 'left random' not in told


def test_pretrained_weights_come_through_the_hub(tmp_path, monkeypatch):
    donor = get_encoder('resnet18')
    safetensors.torch.save_file(donor.state_dict(), tmp_path / 'model.safetensors')
    asked = []

    def from_cache(repository, filename, revision):
        asked.append((repository, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr('segmentation_models_pytorch.encoders.hf_hub_download', from_cache)
    model = model_dispatcher.build_model('smp_unet_resnet18', weights='imagenet')
    assert ('smp-hub/resnet18.imagenet', 'model.safetensors') in asked
    assert torch.equal(model.encoder.conv1.weight, donor.conv1.weight)


@pytest.mark.parametrize(
    ('prefix', 'suffix'),
    [
        ('', '.pth'),
        ('encoder.', '.pt'),
        ('model.encoder.', '.ckpt'),
        ('module.', '.safetensors'),
        ('backbone.', '.safetensors'),
    ],
)
def test_weights_files_of_many_layouts(tmp_path, capsys, prefix, suffix):
    donor = get_encoder('resnet18')
    state = {prefix + name: tensor for name, tensor in donor.state_dict().items()}
    state |= {'fc.weight': torch.zeros(3, 3), 'model.decoder.conv1.weight': torch.zeros(5)}
    file = tmp_path / f'weights{suffix}'
    if suffix == '.safetensors':
        safetensors.torch.save_file(state, file)
    else:
        torch.save({'state_dict': state, 'epoch': 3}, file)
    model = model_dispatcher.build_model('smp_fpn_resnet18', weights=str(file))
    own = model.encoder.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in donor.state_dict().items())
    assert '100 of 100 encoder tensors' in capsys.readouterr().out


@pytest.mark.parametrize(
    'name', ['timm-tf_efficientnet_lite0', 'tu-tf_efficientnet_lite0', 'tu-convnext_atto']
)
def test_a_file_in_timms_layout_gives_every_tensor(tmp_path, capsys, name):
    import timm

    donor = timm.create_model(name.partition('-')[2], pretrained=False)
    for tensor in donor.state_dict().values():  # batch norm's first values are all alike
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    torch.save(donor.state_dict(), tmp_path / 'w.pth')
    model = model_dispatcher.build_model(f'smp_unet_{name}', weights=str(tmp_path / 'w.pth'))
    flat = {encoders.flatten(name): tensor for name, tensor in donor.state_dict().items()}
    own = model.encoder.state_dict()
    assert all(torch.equal(flat[encoders.flatten(key)], tensor) for key, tensor in own.items())
    assert 'left random' not in capsys.readouterr().out


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save({'layer1.weight': torch.zeros(3)}, tmp_path / 'w.pt')
    with pytest.raises(config.UserMistake, match='none of its 1 tensors fits'):
        model_dispatcher.build_model('smp_unet_resnet18', weights=str(tmp_path / 'w.pt'))


@pytest.mark.parametrize('data', [b'', b'abc', pickle.dumps(Evil())])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_damaged_or_dangerous_weights_are_refused(tmp_path, data, suffix):
    (tmp_path / f'w{suffix}').write_bytes(data)
    with pytest.raises(config.UserMistake, match='not a weights file'):
        model_dispatcher.build_model('smp_unet_resnet18', weights=str(tmp_path / f'w{suffix}'))
    with pytest.raises(config.UserMistake, match='no such file'):
        model_dispatcher.build_model('smp_unet_resnet18', weights=str(tmp_path / 'gone.pth'))


def test_a_size_that_does_not_fit_is_told_with_one_that_does():
    model = model_dispatcher.build_model('smp_fpn_resnet18')
    model_dispatcher.try_out(model, 'smp_fpn_resnet18', 2, (3, 64, 96))
    config.CROP_SIZE = (100, 90)
    with pytest.raises(
        config.UserMistake, match=r'CROP_SIZE=\(100, 90\).*divisible by 32.*\(128, 96\)'
    ):
        model_dispatcher.try_out(model, 'smp_fpn_resnet18', 2, (3, 100, 90))


@pytest.fixture
def tiny(tmp_path):
    command_line.override(settings(tmp_path))
    return tmp_path


def test_the_model_normalises_eight_bit_images(tiny):
    model = CarvanaModel([1], [0]).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (config.MODEL_MEAN, config.MODEL_STD))
    with torch.inference_mode():
        assert torch.allclose(model(images), model.model((images / 255 - mean) / std), atol=1e-5)
        pixels = images.float()
        assert torch.equal(model(pixels), model(images))
        assert torch.equal(pixels, images.float())  # it normalises a copy


def test_hyperparameters_are_plain_and_complete(tiny):
    hparams = CarvanaModel([1, 2], [0]).hparams
    assert set(config.constants()) < set(hparams)
    plain = (str, int, float, bool, list, dict, type(None))
    assert all(type(value) in plain for value in hparams.values())


def test_a_checkpoint_alone_rebuilds_the_model(tiny, monkeypatch):
    config.CLASSES, config.CROP_SIZE = 3, [32, 64]
    config.ENCODER_WEIGHTS = 'imagenet'  # which would need the hub
    model = CarvanaModel([1], [0], pretrained=False).eval()
    checkpoint = {
        'state_dict': model.state_dict(),
        'hyper_parameters': dict(model.hparams),
        'pytorch-lightning_version': '2.6.0',
    }
    torch.save(checkpoint, tiny / 'model.ckpt')
    command_line.override(['MODEL_NAME=smp_fpn_resnet50', 'CLASSES=1', 'CROP_SIZE=512'])
    again = CarvanaModel.load_from_checkpoint(tiny / 'model.ckpt', weights_only=True).eval()
    assert again.input_size == (32, 64, 3) and again.hparams.CLASSES == 3
    images = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(model(images), again(images))
