"""The container images without a container daemon: Debian packages, hashed wheels and our code as OCI archives, equal at every build."""
