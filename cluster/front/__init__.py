"""The one way in, whatever the wire: who asks, whether it can be, and the stream that follows."""
