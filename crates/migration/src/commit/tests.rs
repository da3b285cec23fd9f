//! Every interleaving of two hosts, their link, deaths, delays and one who decides.

use stateright::{Checker, Model, Property};

use super::*;

/// Two hosts and what is on the way between them, in order, as on a socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    destination: Destination,
    source_lives: bool,
    destination_lives: bool,
    /// The destination's core has ended by itself; its host is there, and its broker can read what
    /// it has left.
    destination_ended: bool,
    to_destination: Vec<SourceWord>,
    to_source: Vec<DestinationWord>,
    /// Nothing passes any more. Each side notices when it does.
    cut: bool,
    /// What was sent after or lost by the cut is gone; who has not noticed yet.
    source_noticed: bool,
    destination_noticed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Something that happens inside a host, or that it notices.
    Source(SourceInput),
    Destination(DestinationInput),
    /// The oldest word arrives.
    ArriveAtSource,
    ArriveAtDestination,
    Cut,
    SourceDies,
    DestinationDies,
    DestinationEnds,
}

struct Everything {
    hosts_die: bool,
    /// Breaks the protocol on purpose, so that the checks themselves are checked.
    destination_runs_without_commit: bool,
    source_returns_at_deadline: bool,
    /// The destination's broker takes a machine that is still expected for one that never came.
    broker_answers_early: bool,
}

const FAITHFUL: Everything = Everything {
    hosts_die: true,
    destination_runs_without_commit: false,
    source_returns_at_deadline: false,
    broker_answers_early: false,
};

impl World {
    fn runs(&self) -> u32 {
        u32::from(self.source_lives && self.source.may_run())
            + u32::from(self.destination_works() && self.destination.may_run())
    }

    fn destination_works(&self) -> bool {
        self.destination_lives && !self.destination_ended
    }

    /// What the destination's broker answers when it is asked whether the machine came: what its
    /// core does, or has left when it ended. Nothing as long as it may still come.
    fn has_come(&self) -> Option<bool> {
        match self.destination {
            Destination::Running => Some(true),
            Destination::Discarded => Some(false),
            Destination::Receiving | Destination::Loaded => self.destination_ended.then_some(false),
        }
    }

    fn has_lost_a_host(&self) -> bool {
        !self.source_lives || !self.destination_lives
    }

    /// It came, and its core has failed since, as any machine's may.
    fn has_failed_there(&self) -> bool {
        self.destination_ended && self.destination == Destination::Running
    }
}

impl Everything {
    fn source(&self, world: &mut World, input: SourceInput) {
        let (next, word) = world.source.on(input);
        world.source = next;
        if self.source_returns_at_deadline
            && next == Source::Unresolved
            && input == SourceInput::Deadline
        {
            world.source = Source::Kept;
        }
        if let Some(word) = word
            && !world.cut
        {
            world.to_destination.push(word);
        }
    }

    fn destination(&self, world: &mut World, input: DestinationInput) {
        let (mut next, word) = world.destination.on(input);
        if self.destination_runs_without_commit && input == DestinationInput::LinkLost {
            next = Destination::Running;
        }
        world.destination = next;
        if let Some(word) = word
            && !world.cut
        {
            world.to_source.push(word);
        }
    }
}

impl Model for Everything {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            source: Source::Copying,
            destination: Destination::Receiving,
            source_lives: true,
            destination_lives: true,
            destination_ended: false,
            to_destination: Vec::new(),
            to_source: Vec::new(),
            cut: false,
            source_noticed: false,
            destination_noticed: false,
        }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        use Destination as At;
        use DestinationInput as ToDestination;
        use SourceInput as ToSource;
        if world.source_lives {
            match world.source {
                Source::Copying => {
                    steps.extend([ToSource::Stop, ToSource::Failed].map(Step::Source));
                }
                Source::Stopped => {
                    steps.extend([ToSource::Failed, ToSource::Deadline].map(Step::Source));
                }
                Source::Committed => steps.push(Step::Source(ToSource::Deadline)),
                // The brokers ask one another; when the other host is lost, somebody decides.
                Source::Unresolved => match world.has_come() {
                    _ if !world.destination_lives => {
                        steps.push(Step::Source(ToSource::TakenBack));
                    }
                    Some(true) => steps.push(Step::Source(ToSource::LetGo)),
                    Some(false) => steps.push(Step::Source(ToSource::TakenBack)),
                    None if self.broker_answers_early => {
                        steps.push(Step::Source(ToSource::TakenBack));
                    }
                    None => {}
                },
                Source::Gone | Source::Kept => {}
            }
            if world.cut && !world.source_noticed {
                steps.push(Step::Source(ToSource::LinkLost));
            }
            if !world.to_source.is_empty() {
                steps.push(Step::ArriveAtSource);
            }
            if self.hosts_die {
                steps.push(Step::SourceDies);
            }
        }
        if world.destination_works() {
            let waits = [ToDestination::Failed, ToDestination::Deadline];
            match world.destination {
                // It can be complete only after the source has stopped and sent the last of it.
                At::Receiving => {
                    steps.extend(waits.map(Step::Destination));
                    if world.source == Source::Stopped {
                        steps.push(Step::Destination(ToDestination::Loaded));
                    }
                }
                At::Loaded => steps.extend(waits.map(Step::Destination)),
                At::Running | At::Discarded => {}
            }
            if world.cut && !world.destination_noticed {
                steps.push(Step::Destination(ToDestination::LinkLost));
            }
            if !world.to_destination.is_empty() {
                steps.push(Step::ArriveAtDestination);
            }
            steps.push(Step::DestinationEnds);
        }
        if self.hosts_die && world.destination_lives {
            steps.push(Step::DestinationDies);
        }
        if !world.cut {
            steps.push(Step::Cut);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        match step {
            Step::Source(input) => {
                next.source_noticed |= input == SourceInput::LinkLost;
                self.source(&mut next, input);
            }
            Step::Destination(input) => {
                next.destination_noticed |= input == DestinationInput::LinkLost;
                self.destination(&mut next, input);
            }
            Step::ArriveAtSource => {
                let input = match next.to_source.remove(0) {
                    DestinationWord::Loaded => SourceInput::Loaded,
                    DestinationWord::Running => SourceInput::Running,
                    DestinationWord::Discarded => SourceInput::Discarded,
                };
                self.source(&mut next, input);
            }
            Step::ArriveAtDestination => {
                let input = match next.to_destination.remove(0) {
                    SourceWord::Commit => DestinationInput::Commit,
                    SourceWord::Abort => DestinationInput::Abort,
                };
                self.destination(&mut next, input);
            }
            Step::Cut => {
                next.cut = true;
                // What was on the way may be lost or may still arrive: both are tried, since a
                // step of arrival may come before this one.
                next.to_source.clear();
                next.to_destination.clear();
            }
            Step::SourceDies => {
                next.source_lives = false;
                next.cut = true;
                next.to_source.clear();
            }
            Step::DestinationDies | Step::DestinationEnds => {
                match step {
                    Step::DestinationEnds => next.destination_ended = true,
                    _ => next.destination_lives = false,
                }
                next.cut = true;
                next.to_destination.clear();
            }
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two", |_, world: &World| world.runs() <= 1),
            Property::always("never none for ever", |model, world: &World| {
                let mut steps = Vec::new();
                model.actions(world, &mut steps);
                let fails = |step: &Step| {
                    use Step::{Cut, DestinationDies, DestinationEnds, SourceDies};
                    matches!(step, SourceDies | DestinationDies | DestinationEnds | Cut)
                };
                let at_rest = steps.iter().all(fails);
                let lost = world.has_lost_a_host() || world.has_failed_there();
                !at_rest || lost || world.runs() == 1
            }),
            Property::always(
                "nobody has to decide where both hosts are",
                |model, world: &World| {
                    let mut steps = Vec::new();
                    model.actions(world, &mut steps);
                    let goes_on = |step: &Step| {
                        matches!(
                            step,
                            Step::Source(_) | Step::Destination(_) | Step::ArriveAtDestination
                        )
                    };
                    world.source != Source::Unresolved
                        || world.has_lost_a_host()
                        || steps.iter().any(goes_on)
                },
            ),
            Property::always("who cannot know says so", |_, world: &World| {
                // A source that lives and is at rest either runs, has heard that the other runs,
                // or is the one state that says that somebody must decide.
                match world.source {
                    Source::Gone => {
                        !world.destination_lives || world.destination == Destination::Running
                    }
                    _ => true,
                }
            }),
            Property::sometimes("it moves", |_, world: &World| {
                world.source == Source::Gone && world.destination == Destination::Running
            }),
            Property::sometimes("it stays", |_, world: &World| {
                world.source == Source::Kept && world.destination == Destination::Discarded
            }),
            Property::sometimes("taken back by word", |_, world: &World| {
                world.source == Source::Kept && world.destination == Destination::Discarded
            }),
            Property::sometimes("somebody must ask", |_, world: &World| {
                world.source == Source::Unresolved && !world.has_lost_a_host()
            }),
            Property::sometimes("taken back by a broker's word", |_, world: &World| {
                world.source == Source::Kept && world.destination_ended
            }),
        ]
    }
}

#[test]
fn no_interleaving_gives_two_copies_or_none_for_ever() {
    for hosts_die in [false, true] {
        let model = Everything {
            hosts_die,
            ..FAITHFUL
        };
        let checked = model.checker().spawn_bfs().join();
        checked.assert_properties();
        assert!(
            checked.unique_state_count() > 50,
            "{} states are not everything",
            checked.unique_state_count()
        );
    }
}

#[test]
fn a_broken_protocol_is_found_out() {
    let broken = [
        Everything {
            destination_runs_without_commit: true,
            ..FAITHFUL
        },
        Everything {
            source_returns_at_deadline: true,
            ..FAITHFUL
        },
        Everything {
            broker_answers_early: true,
            ..FAITHFUL
        },
    ];
    for model in broken {
        let checked = model.checker().spawn_bfs().join();
        assert!(checked.discovery("never two").is_some());
    }
}

#[test]
fn what_comes_too_late_changes_nothing() {
    for over in [Source::Gone, Source::Kept] {
        for input in [
            SourceInput::Stop,
            SourceInput::Loaded,
            SourceInput::Running,
            SourceInput::Discarded,
            SourceInput::Failed,
            SourceInput::LinkLost,
            SourceInput::Deadline,
            SourceInput::TakenBack,
            SourceInput::LetGo,
        ] {
            assert_eq!(over.on(input), (over, None));
        }
    }
    assert_eq!(
        Source::Committed.on(SourceInput::Failed),
        (Source::Committed, None),
        "a cancel after the commit is too late"
    );
    for over in [Destination::Running, Destination::Discarded] {
        for input in [
            DestinationInput::Loaded,
            DestinationInput::Commit,
            DestinationInput::Abort,
            DestinationInput::Failed,
            DestinationInput::LinkLost,
            DestinationInput::Deadline,
        ] {
            assert_eq!(over.on(input), (over, None));
        }
    }
}
