"""CloudEvents, the Broker they are posted to, and a bucket's notifications."""
