//! The sender of tables of members: what a control plane tells a process of the others.

use super::*;
use crate::members::{MembersError, TABLE_BYTES_MAX, Table, TableError};

/// A connection over which a process is told who else there is. Calls no functions.
///
/// ```no_run
/// use praas_dataplane::client::{ClientConfig, Members};
/// use praas_dataplane::members::{Member, State, Table};
/// use praas_dataplane::{Credential, Role, Secret};
///
/// let key = Secret::from_file("app.key".as_ref())?;
/// let in_an_hour = praas_dataplane::clock::unix_s() + 3600;
/// let credential = Some(Credential::mint(&key, Role::Control, "control-plane", in_an_hour)?);
/// let config = ClientConfig { credential, ..ClientConfig::default() };
/// let members = vec![Member::active("a", "10.0.0.1:4000".parse()?), Member::at_rest("b", State::Swapped)];
/// Members::connect("10.0.0.1:4000", &config)?.update(&Table::new(7, members)?)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Members {
    link: Link,
    pool: Pool,
    deadline: Duration,
    tables: u64,
}

/// Why a table is not known to be in force.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// The process does not take it. It goes by the table that it had.
    #[error("the process refuses the table: {0}")]
    Refused(#[from] MembersError),
    /// The connection is lost, and the process may have taken the table: connect again and send it again, or a newer one. `Stale` with the same
    /// generation says then that it had.
    #[error("connection lost: {text}; connect and send the table again")]
    ConnectionLost {
        /// What happened to it.
        text: String,
    },
    /// No answer within [`ClientConfig::deadline`]. The process may take the table yet.
    #[error("no answer within {waited_ms} ms; send the table again")]
    Timeout {
        /// The deadline.
        waited_ms: u128,
    },
}

impl Members {
    /// Connects to a process as the control plane. The credential has to be of [`Role::Control`](crate::Role::Control); of the rest of the
    /// configuration `deadline`, `connect_within`, `expect_process`, `congestion` and `checks` count. Blocks for up to `connect_within`.
    ///
    /// # Errors
    /// [`ConnectError`]. Nothing stays behind.
    pub fn connect(address: impl ToString, config: &ClientConfig) -> Result<Members, ConnectError> {
        let config = ClientConfig { wait: WaitMode::Balanced, ..config.clone() };
        let Opened { link, pool, .. } = open(address.to_string(), &config)?;
        Ok(Members { link, pool, deadline: config.deadline, tables: 0 })
    }

    /// Sends a table, and waits until it is in force there: whoever asks the process from then on is told of these members. Gives its generation.
    ///
    /// # Errors
    /// [`UpdateError`]. After `ConnectionLost` this connection is of no more use.
    pub fn update(&mut self, table: &Table) -> Result<u64, UpdateError> {
        let text = table.to_string().into_bytes();
        if text.len() > TABLE_BYTES_MAX {
            let (found_bytes, max_bytes) = (text.len() as u64, TABLE_BYTES_MAX as u64);
            return Err(MembersError::from(TableError::TooLong { found_bytes, max_bytes }).into());
        }
        self.tables += 1;
        let until_ns = now_ns().saturating_add(nanoseconds(self.deadline));
        let header = Header { kind: frame::MEMBERS, call: self.tables, ..Header::default() };
        let Phase::Up(connection) = &mut self.link.phase else { return Err(self.lose("by an earlier update".into())) };
        if let Err(error) = connection.queue(&header, &[], OutgoingBytes::Owned(text)) {
            return Err(self.lose(error.to_string()));
        }
        loop {
            match self.answer() {
                Err(text) => return Err(self.lose(text)),
                Ok(Some(taken)) => return Ok(taken?),
                Ok(None) if now_ns() >= until_ns => {
                    return Err(UpdateError::Timeout { waited_ms: self.deadline.as_millis() });
                }
                Ok(None) => self.link.sleep(Duration::from_nanos(until_ns.saturating_sub(now_ns()))),
            }
        }
    }

    /// Writes what there is to write, and reads what has come. The answer to the last table, if that is it; a text when the connection is of no more use.
    fn answer(&mut self) -> Result<Option<Result<u64, MembersError>>, String> {
        loop {
            let Phase::Up(connection) = &mut self.link.phase else { return Err("by an earlier update".into()) };
            if connection.wants_write() {
                let _ = connection.flush(&mut drop).map_err(|error| error.with_cause())?;
            }
            let received = connection.receive(&mut self.link.scratch, &mut self.pool);
            let Some(Frame { header, body, .. }) = received.map_err(|error| error.with_cause())? else {
                return Ok(None);
            };
            let Received::Whole(body) = body else { return Err("the process sent an answer above every limit".into()) };
            match (header.kind, header.call == self.tables) {
                (frame::MEMBERS_TAKEN, true) if header.flags == 0 => return Ok(Some(Ok(header.aux))),
                (frame::MEMBERS_TAKEN, true) => {
                    let error =
                        serde_json::from_slice(&body).map_err(|error| format!("the process refused it: {error}"))?;
                    return Ok(Some(Err(error)));
                }
                // To a table that was given up.
                (frame::MEMBERS_TAKEN, false) => {}
                (kind, _) => return Err(format!("the process sent a frame of kind {kind}")),
            }
        }
    }

    fn lose(&mut self, text: String) -> UpdateError {
        drop(self.link.lose(now_ns(), &text));
        UpdateError::ConnectionLost { text }
    }
}
