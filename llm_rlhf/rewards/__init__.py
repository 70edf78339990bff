"""What an answer is worth: functions, rules, and models that were trained to say it."""
