"""Routing on a pretrained decoder: text passages in place of images."""
