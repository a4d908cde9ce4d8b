"""Native routes: Text Generation Inference's shapes."""
