"""The database's shape over time. `upgrade` brings any database to the newest one."""

from migrations.schema import downgrade, upgrade

__all__ = ["downgrade", "upgrade"]
