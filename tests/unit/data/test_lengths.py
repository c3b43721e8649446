"""A run that could not hold one image is refused before anything starts."""

import pytest

from smolray.config import ConfigError, DataConfig, ImageConfig
from smolray.data.encode import Encoder
from smolray.model.tiny import build_processor


def test_a_max_length_below_one_image_is_refused_with_the_nearest():
    processor = build_processor("tiny", ["what is it? red"])
    with pytest.raises(
        ConfigError, match=r"data\.max_length = 16 .*one image.*19 tokens.*nearest: data\.max_length=38"
    ):
        Encoder(processor, DataConfig(max_length=16), ImageConfig())
    Encoder(processor, DataConfig(max_length=38), ImageConfig())
