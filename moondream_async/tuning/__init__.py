"""Fine-tuning: `finetunes` has the calls, `wire` the format, `records` the results."""
