"""Fine-tuning: `finetunes` has the calls, `wire` the format, `records` what comes back."""
