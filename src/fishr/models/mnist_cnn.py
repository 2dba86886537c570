"""DomainBed's network for small images."""

from torch import nn

from fishr.errors import ConfigError


class MNISTCNN(nn.Sequential):
    """Four 3×3 convolutions, each with ReLU and GroupNorm(8), then the mean over space.

    Channels 64, 128 (stride 2), 128, 128.

    Returns 128 features (Gulrajani and Lopez-Paz, arXiv 2007.01434, appendix).

    Args:
        input_shape: ``(channels, height, width)``.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        if len(input_shape) != 3:
            raise ConfigError(f"mnist-cnn takes images (channels, height, width), got inputs of shape {input_shape}")
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for width, stride in ((64, 1), (128, 2), (128, 1), (128, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.ReLU(), nn.GroupNorm(8, width)]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = channels
