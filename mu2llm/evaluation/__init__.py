"""Reports by a checkpoint, and what they are worth: text and clinical metrics, audits, leaderboard, HTML report."""
