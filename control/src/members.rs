//! Telling processes who there is: what `praas members` does until a control plane does it by itself.

use std::path::Path;

use praas_dataplane::client::{ClientConfig, ConnectError, Members, UpdateError};
use praas_dataplane::members::{MembersError, Table};
use praas_dataplane::{Credential, SecretError};

/// Why a process may not go by the table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TellError {
    /// The table cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The path as given.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no table.
    #[error("{path}: {error}")]
    Table {
        /// The path as given.
        path: String,
        /// What is wrong with it.
        error: MembersError,
    },
    /// There is no credential.
    #[error(transparent)]
    Credential(#[from] SecretError),
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The process does not take it, or was not heard of any more.
    #[error("{address}: {error}")]
    Update {
        /// Where it is.
        address: String,
        /// Why.
        error: UpdateError,
    },
}

/// Reads a table and a credential of role `control`.
///
/// # Errors
/// `Read`, `Table`, `Credential`.
pub fn read(table: &Path, credential: &Path) -> Result<(Table, Credential), TellError> {
    let path = table.display().to_string();
    let text = std::fs::read(table).map_err(|source| TellError::Read { path: path.clone(), source })?;
    let table = Table::parse(&text).map_err(|error| TellError::Table { path, error: error.into() })?;
    Ok((table, Credential::from_file(credential)?))
}

/// Sends a table to the process at `address`, and waits until it is in force there. Blocks for up to 5 s to connect and a minute for the answer.
///
/// # Errors
/// `Connect`, `Update`.
pub fn tell(address: &str, table: &Table, credential: &Credential) -> Result<(), TellError> {
    let config = ClientConfig { credential: Some(credential.clone()), ..ClientConfig::default() };
    let updated = Members::connect(address, &config)?.update(table);
    updated.map(drop).map_err(|error| TellError::Update { address: address.to_owned(), error })
}
