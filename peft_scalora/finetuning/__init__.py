"""The fine-tuning application behind `peft-scalora finetune`."""
