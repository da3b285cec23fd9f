//! `godwit job`: what takes its time.

use super::each;
use crate::connection::Broker;
use crate::error::{Result, What as _, is_gone};
use crate::job::Job;
use crate::options::{Job as Verb, Wait};
use crate::render::{Output, text};
use crate::view;

pub async fn run(broker: &Broker, output: Output, verb: Verb) -> Result<()> {
    match verb {
        Verb::List => list(broker, output).await,
        Verb::Show { ids } => {
            let jobs = each(&ids, async |id| {
                Job::numbered(broker, *id).await?.look().await
            })
            .await;
            show(output, &jobs.done)?;
            jobs.result()
        }
        Verb::Wait { ids, timeout } => {
            let wait = Wait {
                no_wait: false,
                timeout,
            };
            let jobs = each(&ids, async |id| {
                Job::numbered(broker, *id).await?.wait(wait).await
            })
            .await;
            output.print_json(&jobs.done)?;
            jobs.result()
        }
        Verb::Set { id, max_downtime } => {
            let job = Job::numbered(broker, id).await?;
            job.set_max_downtime(max_downtime).await?;
            output.print_json(&job.look().await?)
        }
        Verb::Cancel { ids } => {
            let jobs = each(&ids, async |id| {
                let job = Job::numbered(broker, *id).await?;
                job.cancel().await?;
                job.look().await
            })
            .await;
            output.print_json(&jobs.done)?;
            jobs.result()
        }
    }
}

fn show(output: Output, jobs: &[view::Job]) -> Result<()> {
    output.print(jobs, |jobs| {
        let texts: Vec<_> = jobs.iter().map(text::job).collect();
        texts.join("\n")
    })
}

async fn list(broker: &Broker, output: Output) -> Result<()> {
    let mut jobs = Vec::new();
    for entry in broker.manager().await?.list_jobs().await.what("the jobs")? {
        let what = format!("job {}", entry.id);
        match broker
            .properties(&what, &entry.path, "org.godwit.Vmm1.Job")
            .await
        {
            Ok(properties) => jobs.push(view::Job::read(&properties).what(what)?),
            // Its time is over since the list was made.
            Err(crate::error::Failure::Refused { error, .. }) if is_gone(&error) => {}
            Err(failure) => return Err(failure),
        }
    }
    output.print(jobs.as_slice(), |jobs| text::jobs(jobs, output.legend))
}
