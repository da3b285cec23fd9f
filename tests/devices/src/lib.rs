//! Conformance of device processes, driven over a real vhost-user socket without a guest.
//!
//! Every device passes the same cases; a `Subject` says what differs between devices.
//! A new device is a row in the list at the end. What is served over vfio-user has tests of its own.

#![cfg(test)]

mod balloon;
mod blk;
mod cases;
mod fault;
mod net;
mod subject;
mod vfio;

/// Makes the tests of each device: all cases, each under its own name.
macro_rules! conformance {
    ($($device:ident: $subject:ty),+ $(,)?) => { $(
        mod $device {
            #[test]
            #[ignore = "writes into tests/compat, see its README"]
            fn write_golden_state() -> anyhow::Result<()> {
                $crate::cases::compat::write_golden_state::<$subject>()
            }

            conformance!(@cases $subject;
                program: capabilities_are_json;
                program: no_socket_is_an_error;
                program: two_sockets_are_an_error;
                program: unknown_option_is_one_line;
                program: socket_in_use_is_refused;
                program: folder_that_is_missing_is_named;
                program: descriptor_that_is_no_socket_is_refused;
                program: connected_descriptor_is_served_once;
                program: listening_descriptor_is_served_again;
                program: sandbox_is_entered;
                program: metrics_are_openmetrics;
                program: readiness_is_told;
                session: features_are_offered_and_kept_to;
                session: back_end_channel_is_taken;
                session: data_moves;
                session: data_moves_without_event_idx;
                session: front_end_reconnects;
                session: front_end_vanishes_under_load;
                session: reset_makes_it_new;
                session: memory_changes_while_running;
                session: memory_slots_come_and_go;
                session: sigterm_under_load_ends_it_promptly;
                life: rings_stop_and_go_on;
                life: stopping_twice_is_fine;
                life: a_kick_while_stopped_is_not_lost;
                life: disabled_rings_rest;
                life: killed_under_load_loses_nothing;
                life: dirty_pages_are_logged;
                life: log_survives_a_new_memory_table;
                life: state_moves_to_another_process;
                wired: wired_rings_rest_until_they_are_started;
                wired: one_message_stops_and_starts_all_rings;
                wired: state_moves_between_stop_and_start;
                wired: one_message_stops_and_saves;
                wired: memory_is_mapped_while_it_runs;
                wired: what_one_may_have_is_given_up_and_taken_again;
                wired: a_forecast_is_given_while_it_runs;
                wired: impossible_wishes_end_the_session_only;
                compat: golden_states_are_loaded;
                state: state_is_refused_while_running;
                state: truncated_state_is_refused;
                state: corrupted_state_is_refused;
                state: mutated_states_do_no_harm;
                state: unknown_schema_is_refused_by_name;
                state: state_of_another_device_is_refused;
                state: a_peer_that_goes_away_leaves_the_device_alive;
                state: failed_load_needs_a_reset;
                link: interface_is_introspected;
                link: statistics_move_with_data;
                link: life_is_told;
                link: changes_are_signalled;
                link: errors_are_told;
                link: prefault_is_told_and_steered;
                link: device_outlives_its_link;
                link: junk_ends_the_link_only;
                link: a_huge_message_ends_the_link_only;
                link: a_silent_peer_holds_up_nothing;
                link: link_lives_in_the_sandbox;
                link: a_link_that_is_none_is_refused;
                link: own_memory_stays_small;
                hostile: descriptor_loop_breaks_the_queue_only;
                hostile: address_outside_memory_breaks_the_queue_only;
                hostile: wild_available_index_breaks_the_queue_only;
                hostile: head_outside_the_table_breaks_the_queue_only;
                hostile: nested_indirect_table_breaks_the_queue_only;
                hostile: head_made_available_twice_breaks_the_queue_only;
                hostile: garbage_ends_the_session_only;
                hostile: half_a_message_ends_the_session_only;
                hostile: wild_messages_end_the_session_only;
                hostile: ring_memory_taken_away_is_survived;
            );
        }
    )+ };
    (@cases $subject:ty; $($group:ident: $case:ident;)+) => { $(
        #[test]
        fn $case() -> anyhow::Result<()> {
            $crate::cases::$group::$case::<$subject>()
        }
    )+ };
}

conformance! {
    balloon_conformance: crate::balloon::Balloon,
    blk_conformance: crate::blk::Blk,
    fault_conformance: crate::fault::Counter,
    net_conformance: crate::net::Net,
}
