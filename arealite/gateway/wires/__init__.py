"""The formats that agents speak, each as what is asked and how it is replied to: no sockets, no tokens."""
