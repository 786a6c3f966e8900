"""WhiFlash for SGLang: speculative decoding that routes each request between two drafters in every round."""
