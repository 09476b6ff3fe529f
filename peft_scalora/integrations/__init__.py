"""Where other training tools meet ScaLoRA. Only a tool's own module imports it, when it is used."""
