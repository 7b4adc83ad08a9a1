"""What workers load: the acting Manager's rounds of the decisions in :mod:`scheduling`, on registry and depths."""
