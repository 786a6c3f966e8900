"""WhiFlash for SGLang: a decode round routed between two drafters, per request."""
