"""Runs PEFT's own test-suite with another class under the name `peft.LoraConfig`."""
