"""One file a family: config.json to DecoderSpec and tensor names."""
