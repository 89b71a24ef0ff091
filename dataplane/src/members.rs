//! The table of members: which processes an application has, where each is, and what it is doing; and how that is written.
//!
//! The control plane sends it to processes ([`crate::client::Members`]), and a file may hold it (`praas-process --members FILE`). A table is complete: who is not
//! in it is not a member. Tables are numbered; a higher generation replaces a lower one, so that one that got lost does no harm.
//!
//! ```text
//! praas-members 1
//! generation 7
//! # name, state, where it can be dialed, and which life of it that is, if known
//! a active 10.0.0.1:4000 incarnation=1764603955000000000
//! b active 10.0.0.2:4000 [fd00::2]:4000
//! c swapped incarnation=1764603950000000000
//! d stopped
//! e deleted
//! ```
//!
//! One member a line, words apart by spaces; what follows `#` at the start of a line, and empty lines, say nothing. Addresses are numbers: whoever writes the
//! table resolves names, since a process must not wait for a name server.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use praas_transport::hello::is_name;
use serde::{Deserialize, Serialize};

/// Most lines with members in a table, and names that one process ever hears of in one life: a process has a number of 16 bits in
/// records, of which two stand for "this one" and "any".
pub const MEMBERS_MAX: usize = 65_533;
/// Longest table, bytes: 256 for each of [`MEMBERS_MAX`], which has room for a name, a state, an incarnation and three addresses.
pub const TABLE_BYTES_MAX: usize = MEMBERS_MAX * 256;
/// Most addresses of one member.
pub const ADDRESSES_MAX: usize = 8;

/// First line of a table.
const HEAD: &str = "praas-members 1";
/// Bytes of a bad word that an error shows.
const SHOWN_BYTES_MAX: usize = 80;

/// What a member is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// It runs, and can be reached.
    Active,
    /// It is in storage, and will be back as a later life. What is sent to it meanwhile waits, if the sender's policy says so.
    Swapped,
    /// It has ended and nothing of it is kept. It may be started anew, as a later life.
    Stopped,
    /// There is no such process any more.
    Deleted,
}

impl State {
    const ALL: [State; 4] = [State::Active, State::Swapped, State::Stopped, State::Deleted];
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Active => "active",
            State::Swapped => "swapped",
            State::Stopped => "stopped",
            State::Deleted => "deleted",
        })
    }
}

/// One process of an application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name: 1 to 64 bytes of `[A-Za-z0-9._-]`.
    pub name: String,
    /// What it is doing.
    pub state: State,
    /// Which life of it this is, nanoseconds since 1970, if known. Earlier ones are not let in.
    pub incarnation: Option<u64>,
    /// Where it can be dialed, tried in turn. At least one for who is active, at most [`ADDRESSES_MAX`].
    pub addresses: Vec<SocketAddr>,
}

impl Member {
    /// One that runs, at this address.
    pub fn active(name: impl Into<String>, address: SocketAddr) -> Member {
        Member { addresses: vec![address], ..Member::at_rest(name, State::Active) }
    }

    /// One of which nothing is known but its state.
    pub fn at_rest(name: impl Into<String>, state: State) -> Member {
        Member { name: name.into(), state, incarnation: None, addresses: Vec::new() }
    }
}

/// All members of an application at one moment. Does not contradict itself, or there would be none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    generation: u64,
    members: Vec<Member>,
    /// Where each stands in the text, from 1.
    lines: Vec<usize>,
}

/// Why there is no table. Lines are counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum TableError {
    /// Longer than any.
    #[error("the table has {found_bytes} bytes, and may have {max_bytes}; leave out those that are deleted")]
    TooLong {
        /// Of the text.
        found_bytes: u64,
        /// [`TABLE_BYTES_MAX`], or the largest payload that the process takes.
        max_bytes: u64,
    },
    /// More members than there are numbers for.
    #[error("the table has {found} members, and may have {max}; leave out those that are deleted")]
    TooMany {
        /// Lines with members.
        found: usize,
        /// [`MEMBERS_MAX`].
        max: usize,
    },
    /// A line is not what it should be.
    #[error("line {line}: `{found}` is not {expected}")]
    Syntax {
        /// The line.
        line: usize,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// A name may not be one.
    #[error("line {line}: `{name}` is not a name; use 1 to 64 bytes of A-Z a-z 0-9 . _ -")]
    Name {
        /// The line.
        line: usize,
        /// What stands there.
        name: String,
    },
    /// Two lines about one process.
    #[error("line {line}: `{name}` is in line {first_line} already; keep the line that is right")]
    Twice {
        /// The line.
        line: usize,
        /// The name.
        name: String,
        /// The line before.
        first_line: usize,
    },
    /// Nobody could reach it.
    #[error("line {line}: `{name}` is active and has no address; say where it listens, such as 10.0.0.1:4000")]
    NoAddress {
        /// The line.
        line: usize,
        /// The name.
        name: String,
    },
    /// More addresses than are kept.
    #[error("line {line}: `{name}` has {found} addresses, and may have {max}; keep those that are reached best")]
    Addresses {
        /// The line.
        line: usize,
        /// The name.
        name: String,
        /// How many stand there.
        found: usize,
        /// [`ADDRESSES_MAX`].
        max: usize,
    },
    /// An address that nobody can dial: port 0, or all addresses of a host.
    #[error("line {line}: nobody can dial {address}; say where others reach `{name}`, not what it listens on")]
    Undialable {
        /// The line.
        line: usize,
        /// The name.
        name: String,
        /// The address.
        address: SocketAddr,
    },
    /// Two active members, or one member twice, at one address.
    #[error(
        "line {line}: {address} is where `{other}` is; a process has an address for itself: correct the one that is wrong"
    )]
    Shared {
        /// The line.
        line: usize,
        /// The address.
        address: SocketAddr,
        /// Who has it in a line before, or in the same.
        other: String,
    },
    /// Lives are counted from 1.
    #[error("line {line}: `{name}` has incarnation 0; give the one that it said when it was ready, or none")]
    NoLife {
        /// The line.
        line: usize,
        /// The name.
        name: String,
    },
}

impl Table {
    /// The table of this generation with these members. Errors name lines as [`Display`](fmt::Display) writes them: the first member is in line 3.
    ///
    /// # Errors
    /// It contradicts itself, or is too long.
    pub fn new(generation: u64, members: Vec<Member>) -> Result<Table, TableError> {
        let lines = (0..members.len()).map(|at| at + 3).collect();
        Table { generation, members, lines }.checked()
    }

    /// Reads what [`Display`](fmt::Display) writes, or somebody by hand. Takes no more memory than a few times the text.
    ///
    /// # Errors
    /// It is not a table, contradicts itself, or is too long.
    pub fn parse(text: &[u8]) -> Result<Table, TableError> {
        if text.len() > TABLE_BYTES_MAX {
            let (found_bytes, max_bytes) = (text.len() as u64, TABLE_BYTES_MAX as u64);
            return Err(TableError::TooLong { found_bytes, max_bytes });
        }
        let text = std::str::from_utf8(text).map_err(|error| {
            let line = 1 + text[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            syntax(line, "bytes that are no text", "UTF-8")
        })?;
        let said = |(_, line): &(usize, &str)| !line.trim().is_empty() && !line.starts_with('#');
        let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line)).filter(said);
        match lines.next() {
            Some((_, HEAD)) => {}
            head => {
                let (line, found) = head.unwrap_or((1, ""));
                return Err(syntax(line, found, "`praas-members 1`, with which a table begins"));
            }
        }
        let (line, found) = lines.next().unwrap_or((2, ""));
        let generation = found.strip_prefix("generation ").and_then(|number| number.trim().parse().ok());
        let generation = generation.ok_or_else(|| syntax(line, found, "`generation N`, a number of 64 bits"))?;
        let mut table = Table { generation, members: Vec::new(), lines: Vec::new() };
        for (line, text) in lines {
            // Before there are more than may be.
            if table.members.len() == MEMBERS_MAX {
                return Err(TableError::TooMany { found: MEMBERS_MAX + 1, max: MEMBERS_MAX });
            }
            table.members.push(member(line, text)?);
            table.lines.push(line);
        }
        table.checked()
    }

    /// Which of the tables this is.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All members, in the order they were given.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Members with the line that each stands in.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (usize, &Member)> {
        self.lines.iter().copied().zip(&self.members)
    }

    fn checked(self) -> Result<Table, TableError> {
        let (found, max) = (self.members.len(), MEMBERS_MAX);
        if found > max {
            return Err(TableError::TooMany { found, max });
        }
        let (mut names, mut places) = (HashMap::new(), HashMap::new());
        for (line, Member { name, state, incarnation, addresses }) in self.lines() {
            let name_of = || shown(name);
            if !is_name(name.as_bytes()) {
                return Err(TableError::Name { line, name: name_of() });
            }
            if let Some(first_line) = names.insert(name, line) {
                return Err(TableError::Twice { line, name: name_of(), first_line });
            }
            if *incarnation == Some(0) {
                return Err(TableError::NoLife { line, name: name_of() });
            }
            if *state == State::Active && addresses.is_empty() {
                return Err(TableError::NoAddress { line, name: name_of() });
            }
            let (found, max) = (addresses.len(), ADDRESSES_MAX);
            if found > max {
                return Err(TableError::Addresses { line, name: name_of(), found, max });
            }
            for &address in addresses {
                if address.port() == 0 || address.ip().is_unspecified() {
                    return Err(TableError::Undialable { line, name: name_of(), address });
                }
                // Where one was that is gone another may be.
                if *state == State::Active
                    && let Some(other) = places.insert(address, name)
                {
                    return Err(TableError::Shared { line, address, other: other.clone() });
                }
            }
        }
        Ok(self)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEAD}\ngeneration {}", self.generation)?;
        for Member { name, state, incarnation, addresses } in &self.members {
            write!(f, "{name} {state}")?;
            addresses.iter().try_for_each(|address| write!(f, " {address}"))?;
            if let Some(incarnation) = incarnation {
                write!(f, " incarnation={incarnation}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl FromStr for Table {
    type Err = TableError;
    fn from_str(text: &str) -> Result<Table, TableError> {
        Table::parse(text.as_bytes())
    }
}

/// What one line says.
fn member(line: usize, text: &str) -> Result<Member, TableError> {
    let mut words = text.split_ascii_whitespace();
    let name = words.next().unwrap_or("");
    let found = words.next().unwrap_or("");
    let state = State::ALL.into_iter().find(|state| state.to_string() == found);
    let state = state.ok_or_else(|| syntax(line, found, "a state: active, swapped, stopped or deleted"))?;
    let mut member = Member::at_rest(name, state);
    for word in words {
        let number = word.strip_prefix("incarnation=");
        match (number.and_then(|number| number.parse().ok()), word.parse()) {
            (Some(number), _) if member.incarnation.is_none() => member.incarnation = Some(number),
            // One more than may be is enough to say so.
            (None, Ok(address)) if member.addresses.len() <= ADDRESSES_MAX => member.addresses.push(address),
            (None, Ok(_)) => {}
            _ => return Err(syntax(line, word, "an address such as 10.0.0.1:4000, or one incarnation=N")),
        }
    }
    Ok(member)
}

fn syntax(line: usize, found: &str, expected: &str) -> TableError {
    TableError::Syntax { line, found: shown(found), expected: expected.to_owned() }
}

/// Words of others, as long as an error may be.
fn shown(word: &str) -> String {
    let end = word.floor_char_boundary(SHOWN_BYTES_MAX);
    let cut = if end < word.len() { ".." } else { "" };
    format!("{}{cut}", word[..end].escape_debug())
}

/// Why a process did not take a table. Nothing has changed there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MembersError {
    /// It is not one.
    #[error("{0}")]
    Table(#[from] TableError),
    /// The process has this generation or a later one.
    #[error(
        "generation {found} is not newer than {known}, which is in force; number tables upwards, and send the newest"
    )]
    Stale {
        /// Of the table.
        found: u64,
        /// That is in force.
        known: u64,
    },
    /// The process that got it is not active in it.
    #[error(
        "line {line}: `{name}`, which got this table, is {state} in it; end a process before you say so, or correct the line"
    )]
    OwnState {
        /// The line.
        line: usize,
        /// The process's name.
        name: String,
        /// What the table says.
        state: State,
    },
    /// The table is about another life of the process that got it.
    #[error(
        "line {line}: `{name}` is of incarnation {found} here, and this is {own}; send the table to the life that it is about"
    )]
    OwnLife {
        /// The line.
        line: usize,
        /// The process's name.
        name: String,
        /// What the table says.
        found: u64,
        /// What it is.
        own: u64,
    },
    /// A life that is over, or was followed by a later one, is said to be somewhere.
    #[error(
        "line {line}: `{name}` is of incarnation {found} here, and {least} is the earliest that may be, as later ones were met or \
         earlier ones are over; leave the line out or give the life that is there"
    )]
    Life {
        /// The line.
        line: usize,
        /// The name.
        name: String,
        /// What the table says.
        found: u64,
        /// The earliest that makes sense.
        least: u64,
    },
    /// More members than this process is to know.
    #[error(
        "the table has {found} other members, and this process knows {max} at most; start it with a larger --peers-max"
    )]
    TooMany {
        /// Others that are not deleted.
        found: usize,
        /// Its `peers_max`.
        max: usize,
    },
    /// More names than one life of a process can know.
    #[error(
        "{known} names are known and {new} are new, and one life of a process knows {max} at most, deleted ones among them; \
         start the process anew, or swap it out and in"
    )]
    Names {
        /// Names heard of so far.
        known: usize,
        /// Names of the table that are new.
        new: usize,
        /// [`MEMBERS_MAX`].
        max: usize,
    },
    /// Others must not send tables.
    #[error(
        "a connection of role `{role}` may not change members: make a credential with `praas token --role control`"
    )]
    Role {
        /// As its hello proved.
        role: String,
    },
    /// No room to receive it now.
    #[error("no payload memory for a table of {needs_bytes} bytes now; send it again")]
    NoSpace {
        /// Of the table.
        needs_bytes: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], port))
    }

    fn sample() -> Table {
        let members = vec![
            Member { incarnation: Some(17), ..Member::active("a", address(1)) },
            Member {
                addresses: vec![address(2), "[fd00::2]:4000".parse().unwrap()],
                ..Member::active("b.B_b-9", address(2))
            },
            Member { incarnation: Some(u64::MAX), ..Member::at_rest("c", State::Swapped) },
            Member { addresses: vec![address(1)], ..Member::at_rest("d", State::Stopped) },
            Member::at_rest("e", State::Deleted),
        ];
        Table::new(7, members).unwrap()
    }

    #[test]
    fn a_table_reads_back_and_may_be_written_by_hand() {
        let table = sample();
        assert_eq!(table.to_string().parse::<Table>().unwrap(), table);
        let by_hand =
            "# who\n\npraas-members 1\n# when\ngeneration 9\n\n  a   active\tincarnation=3 10.0.0.1:1\r\nb deleted";
        let read: Table = by_hand.parse().unwrap();
        let a = Member { incarnation: Some(3), ..Member::active("a", address(1)) };
        assert_eq!((read.generation(), read.members()), (9, &[a, Member::at_rest("b", State::Deleted)][..]));
        assert_eq!(read.lines().map(|(line, _)| line).collect::<Vec<_>>(), [7, 8]);
    }

    /// What is not a table, or contradicts itself: the error names the line, and says what to do.
    #[test]
    fn r4_a_table_that_contradicts_itself_is_refused_with_its_line() {
        let refused = [
            ("", "line 1: `` is not `praas-members 1`"),
            ("praas-members 2\ngeneration 1", "line 1: `praas-members 2` is not"),
            ("praas-members 1", "line 2: `` is not `generation N`"),
            ("praas-members 1\ngeneration -1", "line 2: `generation -1`"),
            ("praas-members 1\ngeneration 18446744073709551616", "line 2"),
            ("+a", "line 3: `` is not a state"),
            ("+a asleep", "line 3: `asleep` is not a state: active, swapped, stopped or deleted"),
            ("+a active localhost:1", "line 3: `localhost:1` is not an address such as 10.0.0.1:4000"),
            ("+a swapped incarnation=1 incarnation=2", "line 3: `incarnation=2` is not"),
            ("+a swapped incarnation=x", "line 3: `incarnation=x` is not"),
            ("+a swapped incarnation=0", "line 3: `a` has incarnation 0"),
            ("+a/b swapped", "line 3: `a/b` is not a name"),
            ("+a swapped\n#\nb stopped\na stopped", "line 6: `a` is in line 3 already"),
            ("+a active", "line 3: `a` is active and has no address"),
            ("+a active 10.0.0.1:0", "line 3: nobody can dial 10.0.0.1:0"),
            ("+a active [::]:4000", "line 3: nobody can dial [::]:4000"),
            ("+a active 10.0.0.1:1\nb active 10.0.0.2:1 10.0.0.1:1", "line 4: 10.0.0.1:1 is where `a` is"),
            ("+a active 10.0.0.1:1 10.0.0.1:1", "line 3: 10.0.0.1:1 is where `a` is"),
        ];
        for (text, words) in refused {
            let text = text.replacen('+', "praas-members 1\ngeneration 1\n", 1);
            let said = Table::parse(text.as_bytes()).expect_err(&text).to_string();
            assert!(said.starts_with(words), "{text:?}: {said}");
        }
        let name = "n".repeat(65);
        let said = Table::new(1, vec![Member::at_rest(name, State::Stopped)]).unwrap_err().to_string();
        assert!(said.contains("line 3") && said.contains("1 to 64 bytes"), "{said}");
        let nine = (1..=9).map(address).collect();
        let said = Table::new(1, vec![Member { addresses: nine, ..Member::active("a", address(1)) }]).unwrap_err();
        assert_eq!(said, TableError::Addresses { line: 3, name: "a".into(), found: 9, max: 8 });
        let said = Table::parse(b"praas-members 1\ngeneration 1\na \xff").unwrap_err().to_string();
        assert!(said.starts_with("line 3: ") && said.contains("UTF-8"), "{said}");
        // One that is long says so, and does not fill a log.
        let said =
            Table::parse(format!("praas-members 1\ngeneration 1\na {}", "é".repeat(1000)).as_bytes()).unwrap_err();
        assert!(said.to_string().len() < 300, "{said}");
    }

    #[test]
    fn r4_a_table_is_bounded_and_the_bound_is_said() {
        let many: Vec<Member> = (0..=MEMBERS_MAX).map(|at| Member::at_rest(format!("m{at}"), State::Swapped)).collect();
        let text = |members: &[Member]| Table { generation: 1, members: members.to_vec(), lines: vec![] }.to_string();
        let most = text(&many[1..]).parse::<Table>().unwrap();
        assert_eq!(most.members().len(), MEMBERS_MAX);
        let over = TableError::TooMany { found: MEMBERS_MAX + 1, max: MEMBERS_MAX };
        assert_eq!(text(&many).parse::<Table>(), Err(over.clone()));
        assert_eq!(Table::new(1, many), Err(over));
        let long = vec![b'#'; TABLE_BYTES_MAX + 1];
        assert!(
            matches!(Table::parse(&long), Err(TableError::TooLong { max_bytes, .. }) if max_bytes == TABLE_BYTES_MAX as u64)
        );
    }

    /// Whatever a text has become, it is refused, or is a table that reads back as itself.
    fn sound(text: &[u8]) {
        if let Ok(table) = Table::parse(text) {
            let again: Table = table.to_string().parse().unwrap();
            assert_eq!((again.generation, again.members), (table.generation, table.members));
        }
    }

    #[test]
    fn r4_every_truncation_and_every_flipped_bit_is_refused_or_a_table() {
        let text = sample().to_string().into_bytes();
        for bytes in 0..text.len() {
            sound(&text[..bytes]);
        }
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut flipped = text.clone();
                flipped[at] ^= 1 << bit;
                sound(&flipped);
            }
        }
    }

    proptest! {
        #[test]
        fn r4_no_bytes_at_all_are_more_than_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), with_head in any::<bool>()) {
            let head = if with_head { &b"praas-members 1\ngeneration 1\n"[..] } else { b"" };
            sound(&[head, &bytes].concat());
        }

        #[test]
        fn r4_lines_of_the_right_words_are_refused_or_a_table(words in prop::collection::vec(0_usize..9, 0..60)) {
            const WORDS: [&str; 9] = ["a", "b", "active", "swapped", "10.0.0.1:1", "10.0.0.2:1", "incarnation=4", "\n", "deleted"];
            let text: Vec<&str> = words.iter().map(|word| WORDS[*word]).collect();
            sound(format!("praas-members 1\ngeneration 1\n{}", text.join(" ")).as_bytes());
        }
    }
}
