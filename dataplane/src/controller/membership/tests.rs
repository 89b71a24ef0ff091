#![allow(clippy::cast_possible_truncation, reason = "dice are cut to size on purpose")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::members::Member;

fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 4000))
}

fn member(name: &str, state: State, life: u64, host: u8) -> Member {
    Member {
        name: name.into(),
        state,
        incarnation: Some(life).filter(|life| *life > 0),
        addresses: Some(address(host)).filter(|_| host > 0).into_iter().collect(),
    }
}

fn table(generation: u64, members: Vec<Member>) -> Table {
    Table::new(generation, members).unwrap()
}

/// Ourselves, `own`, of life 100, told of `b` (life 5, host 2) and `c` (swapped).
fn told() -> Membership {
    let mut membership = Membership::new("own", 100, 3);
    let first = vec![member("b", State::Active, 5, 2), member("c", State::Swapped, 0, 0)];
    let is_new = |peer, to, moved, life| Change { peer, to, is_new: true, moved, life };
    assert_eq!(
        membership.update(&table(3, first)).unwrap(),
        [is_new(0, State::Active, true, Some(5)), is_new(1, State::Swapped, false, None)]
    );
    membership
}

#[test]
fn r4_what_changes_is_said_and_what_does_not_is_not() {
    let mut membership = told();
    let change = |peer, to, moved, life| Change { peer, to, is_new: false, moved, life };
    let cases = [
        (vec![member("b", State::Active, 5, 2), member("c", State::Swapped, 0, 0)], vec![]),
        // An unknown life of the same address is no news.
        (vec![member("b", State::Active, 0, 2), member("c", State::Swapped, 0, 0)], vec![]),
        // Back, somewhere.
        (
            vec![
                member("c", State::Active, 9, 3),
                member("b", State::Active, 0, 2),
                member("own", State::Active, 100, 1),
            ],
            vec![change(1, State::Active, true, Some(9))],
        ),
        // Elsewhere; not mentioned is deleted.
        (
            vec![member("c", State::Active, 0, 4)],
            vec![change(1, State::Active, true, None), change(0, State::Deleted, false, None)],
        ),
        (vec![member("c", State::Stopped, 9, 0)], vec![change(1, State::Stopped, false, Some(9))]),
        (
            vec![member("b", State::Active, 6, 2), member("c", State::Active, 10, 4)],
            vec![change(0, State::Active, true, Some(6)), change(1, State::Active, true, Some(10))],
        ),
        // Of whom nobody ever heard, nobody need hear that it is gone.
        (
            vec![
                member("z", State::Deleted, 0, 0),
                member("b", State::Deleted, 0, 0),
                member("c", State::Active, 0, 4),
            ],
            vec![change(0, State::Deleted, false, None)],
        ),
    ];
    for (generation, (members, changes)) in (4..).zip(cases) {
        assert_eq!(membership.update(&table(generation, members)).unwrap(), changes, "{generation}");
        assert_eq!(membership.generation(), generation);
    }
    assert_eq!((membership.number_of("b"), membership.number_of("z")), (Some(0), None), "a number stays");
}

#[test]
fn r4_g7_a_table_that_contradicts_what_is_known_is_refused_whole() {
    // Its life 5 is over, and a later one of `c` was met.
    let over = {
        let mut membership = told();
        membership
            .update(&table(4, vec![member("b", State::Stopped, 5, 0), member("c", State::Active, 8, 3)]))
            .unwrap();
        membership.met(1, 9);
        membership
    };
    let refused: [(&Membership, Vec<Member>, &str); 12] = [
        (&over, vec![member("own", State::Swapped, 0, 0)], "line 3: `own`, which got this table, is swapped in it"),
        (&over, vec![member("own", State::Deleted, 0, 0)], "line 3: `own`, which got this table, is deleted"),
        (&over, vec![member("own", State::Active, 99, 1)], "line 3: `own` is of incarnation 99 here, and this is 100"),
        (&over, vec![member("own", State::Active, 101, 1)], "line 3: `own` is of incarnation 101"),
        // A life that is over, wherever it is said to be.
        (&over, vec![member("b", State::Active, 5, 2)], "line 3: `b` is of incarnation 5 here, and 6 is the earliest"),
        (&over, vec![member("b", State::Swapped, 4, 0)], "line 3: `b` is of incarnation 4 here, and 6"),
        // An earlier life than the one that was met, elsewhere.
        (&over, vec![member("c", State::Active, 8, 4)], "line 3: `c` is of incarnation 8 here, and 9"),
        (&over, vec![member("c", State::Active, 1, 4)], "line 3: `c` is of incarnation 1 here, and 9"),
        (&over, vec![member("c", State::Stopped, 8, 0)], "line 3: `c` is of incarnation 8 here, and 9"),
        (
            &over,
            ["d", "e", "f", "g"].map(|name| member(name, State::Swapped, 0, 0)).to_vec(),
            "the table has 4 other members, and this process knows 3 at most",
        ),
        (
            &over,
            vec![member("d", State::Active, 0, 4), member("b", State::Active, 3, 5)],
            "line 4: `b` is of incarnation 3",
        ),
        (&over, vec![member("c", State::Swapped, 7, 5)], "line 3: `c` is of incarnation 7 here"),
    ];
    for (before, members, words) in refused {
        let mut membership = before.clone();
        let said = membership.update(&table(5, members)).expect_err(words).to_string();
        assert!(said.starts_with(words), "{said}");
        assert_eq!(membership, *before, "nothing has changed: {words}");
    }
    // Behind, and no contradiction: where it was, whoever is there now; stopped or deleted, whatever it was; and the next life of what is over.
    let taken = [
        member("c", State::Active, 8, 3),
        member("b", State::Stopped, 5, 0),
        member("b", State::Active, 6, 2),
        member("c", State::Deleted, 8, 0),
    ];
    for one in taken {
        over.clone().update(&table(5, vec![one])).unwrap();
    }
}

#[test]
fn r4_a_table_that_is_not_newer_is_stale() {
    let mut membership = told();
    for found in [0, 1, 3] {
        let before = membership.clone();
        let members = vec![member("b", State::Deleted, 0, 0)];
        assert_eq!(membership.update(&table(found, members)), Err(MembersError::Stale { found, known: 3 }));
        assert_eq!(membership, before);
    }
    // A lost one does no harm.
    membership.update(&table(u64::MAX, vec![])).unwrap();
    assert_eq!((membership.state_of(0), membership.state_of(1)), (State::Deleted, State::Deleted));
}

/// A number is never somebody else's, so that they are used up in the end.
#[test]
fn r4_names_are_bounded_and_the_bound_is_said() {
    let mut membership = Membership { names_max: 4, ..Membership::new("own", 100, 3) };
    for generation in 1..=4 {
        membership.update(&table(generation, vec![member(&format!("m{generation}"), State::Swapped, 0, 0)])).unwrap();
    }
    let before = membership.clone();
    let more = |name| vec![member(name, State::Swapped, 0, 0)];
    let error = membership.update(&table(5, more("m5"))).unwrap_err();
    assert_eq!(error, MembersError::Names { known: 4, new: 1, max: 4 });
    assert!(error.to_string().contains("swap it out and in"), "{error}");
    assert_eq!(membership, before);
    membership.update(&table(5, more("m2"))).unwrap();
}

/// What is known of one member, said as plainly as can be: the last that a table said of it, and the lives that were ever named or met.
#[derive(Debug, Clone)]
struct Plain {
    state: State,
    place: Vec<SocketAddr>,
    lives: BTreeSet<u64>,
    over: BTreeSet<u64>,
}

#[derive(Debug, Clone)]
enum Step {
    Update { newer: bool, members: Vec<(u8, u8, u64, u8)> },
    Met { who: u8, life: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let line = (0_u8..6, 0_u8..4, 0_u64..6, 0_u8..4);
    let update = (prop::bool::weighted(0.9), prop::collection::vec(line, 0..6))
        .prop_map(|(newer, members)| Step::Update { newer, members });
    let met = (0_u8..6, 1_u64..7).prop_map(|(who, life)| Step::Met { who, life });
    prop::collection::vec(prop_oneof![4 => update, 1 => met], 1..40)
}

const STATES: [State; 4] = [State::Active, State::Swapped, State::Stopped, State::Deleted];

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn r4_any_history_of_tables_leaves_what_the_last_one_said(steps in steps()) {
        let mut membership = Membership::new("own", 3, 5);
        let mut plain: BTreeMap<String, Plain> = BTreeMap::new();
        let mut numbers: BTreeMap<String, PeerNumber> = BTreeMap::new();
        let mut heard: Vec<(State, bool)> = Vec::new();
        for (generation, step) in (1..).zip(steps) {
            let (newer, lines) = match step {
                Step::Met { who, life } => {
                    // Who is let in is of no life that is over, or earlier than another.
                    let name = format!("m{who}");
                    if let Some(one) = plain.get_mut(&name)
                        && one.state == State::Active
                        && one.lives.last().is_none_or(|last| life >= *last)
                        && one.over.last().is_none_or(|over| life > *over)
                    {
                        one.lives.insert(life);
                        membership.met(numbers[&name], life);
                    }
                    continue;
                }
                Step::Update { newer, members } => (newer, members),
            };
            // Names once, and addresses of their own.
            let mut seen = BTreeSet::new();
            let lines = lines.into_iter().filter(|(who, ..)| seen.insert(*who));
            let members: Vec<Member> = lines
                .map(|(who, state, life, host)| {
                    let name = if who == 5 { "own".into() } else { format!("m{who}") };
                    let host = if state == 0 { 1 + host + 10 * who } else { host.min(1) * (1 + 10 * who) };
                    member(&name, STATES[usize::from(state)], life, host)
                })
                .collect();
            let generation = if newer { generation } else { membership.generation() };
            let table = table(generation, members.clone());
            let contradicts = members.iter().any(|member| {
                if member.name == "own" {
                    return member.state != State::Active || member.incarnation.is_some_and(|life| life != 3);
                }
                let (Some(one), Some(life)) = (plain.get(&member.name), member.incarnation) else { return false };
                let moves = !member.addresses.is_empty() && member.addresses != one.place;
                let is_over = one.over.last().is_some_and(|over| life <= *over) && one.lives.last() == one.over.last();
                let is_behind = one.lives.last().is_some_and(|last| life < *last);
                match member.state {
                    State::Active | State::Swapped => is_over || is_behind && (moves || one.lives.last() == one.over.last()),
                    State::Stopped => is_behind,
                    State::Deleted => false,
                }
            });
            let before = membership.clone();
            match membership.update(&table) {
                Err(_) => {
                    prop_assert!(!newer || contradicts);
                    prop_assert_eq!(&membership, &before);
                    continue;
                }
                Ok(changes) => {
                    prop_assert!(newer && !contradicts);
                    // Whoever hears of changes only knows the same.
                    for Change { peer, to, is_new, .. } in changes {
                        prop_assert_eq!(is_new, peer == heard.len());
                        if is_new {
                            heard.push((to, true));
                        } else {
                            heard[peer].0 = to;
                        }
                    }
                }
            }
            for one in plain.values_mut() {
                one.state = State::Deleted;
            }
            for member in members.into_iter().filter(|member| member.name != "own") {
                let known = plain.contains_key(&member.name);
                if !known && member.state == State::Deleted {
                    continue;
                }
                let nothing = Plain { state: State::Deleted, place: vec![], lives: BTreeSet::new(), over: BTreeSet::new() };
                let one = plain.entry(member.name).or_insert(nothing);
                one.state = member.state;
                one.lives.extend(member.incarnation);
                if !member.addresses.is_empty() {
                    one.place = member.addresses;
                }
            }
            for one in plain.values_mut().filter(|one| matches!(one.state, State::Stopped | State::Deleted)) {
                one.over.extend(one.lives.iter().copied());
            }
            for (name, one) in &plain {
                let number = membership.number_of(name);
                prop_assert_eq!(*numbers.entry(name.clone()).or_insert(number.unwrap()), number.unwrap(), "a number stays");
                let number = number.unwrap();
                prop_assert_eq!(membership.name_of(number), Some(&**name));
                prop_assert_eq!((membership.state_of(number), heard[number].0), (one.state, one.state));
                prop_assert_eq!(membership.addresses_of(number), &*one.place);
                prop_assert!(one.state != State::Active || !one.place.is_empty());
                // The earliest life that is let in is the latest known, or the next when that is over.
                let last = one.lives.last().copied().unwrap_or(0);
                let is_over = last > 0 && one.over.last() == Some(&last);
                prop_assert_eq!(membership.least_life_of(number), last + u64::from(is_over));
            }
            for state in STATES {
                let listed: BTreeSet<&str> = membership.names_in(state).collect();
                let expected = plain.iter().filter(|(_, one)| one.state == state).map(|(name, _)| &**name).collect();
                prop_assert_eq!(listed, expected);
            }
        }
    }
}
