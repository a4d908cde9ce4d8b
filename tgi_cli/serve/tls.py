"""TLS of the listening socket, from the files that `--ssl-certfile` and `--ssl-keyfile` name.

Knows no HTTP. The same check runs before the first process starts and in each HTTP worker.
"""

from __future__ import annotations

import ssl

from tgi_cli.config import ServerConfig
from tgi_cli.errors import UsageError


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """The server's TLS context, None without a certificate.

    With `ssl_ca_certs`, clients must show a certificate of one of these authorities. Raises
    `UsageError` naming the file that does not fit.
    """
    if config.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(config, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is given without --ssl-certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"the certificate {config.ssl_certfile} and its key "
            f"{config.ssl_keyfile or '(in the same file)'} cannot be used: {_reason(error)}",
            hint="both must be PEM files and belong together; --ssl-keyfile names the key",
        ) from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                f"--ssl-ca-certs {config.ssl_ca_certs} cannot be used: {_reason(error)}"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a PEM file").lower().replace("_", " ")
    return (getattr(error, "strerror", None) or str(error)).lower()
