use super::*;
use crate::data::batch::Split;

fn filled(task: &Recall, draw: Draw) -> Batch {
    let mut batch = Batch::default();
    task.source(1337).unwrap().fill(draw, &mut batch).unwrap();
    batch
}

fn rows(batch: &Batch) -> impl Iterator<Item = (&[i32], &[i32])> {
    batch.inputs.chunks(batch.block).zip(batch.targets.chunks(batch.block))
}

#[test]
fn every_key_is_shown_once_and_queried() {
    for (vocabulary, block, pairs, queries, fillers) in [
        (64, 64, 4, 1, Fillers::Random),
        (64, 33, 4, 3, Fillers::Random),
        (12, 16, 2, 1, Fillers::Zero),
        (64, 124, 31, 1, Fillers::Random),
        (8192, 256, 32, 1, Fillers::Random),
    ] {
        let task = Recall { vocabulary, block, pairs, queries, fillers, ..Recall::default() };
        let half = vocabulary as i32 / 2;
        let batch = filled(&task, Draw::training(3));
        assert_eq!(batch.answers(), task.batch * pairs * queries);
        for (inputs, targets) in rows(&batch) {
            let (shown, asked) = inputs.split_at(2 * pairs);
            assert!(targets[..2 * pairs].iter().all(|&target| target == IGNORED));
            assert!(inputs.iter().all(|token| (0..vocabulary as i32).contains(token)));
            for pair in shown.chunks(2) {
                let &[key, value] = pair else { panic!() };
                assert!((1..half).contains(&key) && (half..vocabulary as i32).contains(&value));
                assert_eq!(shown.iter().filter(|&&token| token == key).count(), 1);
                assert_eq!(shown.iter().filter(|&&token| token == value).count(), 1);
                // Each time the key comes again, and only then, the answer is its value: no filler is a key.
                let again: Vec<usize> = (0..asked.len()).filter(|&at| asked[at] == key).collect();
                assert_eq!(again.len(), queries);
                assert!(again.iter().all(|&at| targets[2 * pairs + at] == value && at % 2 == 0));
            }
            if fillers == Fillers::Zero {
                assert_eq!(asked.iter().filter(|&&token| token == 0).count(), asked.len() - pairs * queries);
            }
        }
    }
}

#[test]
fn a_draw_says_it_all() {
    let task = Recall::default();
    let seventh = filled(&task, Draw::training(7));
    let mut source = task.source(1337).unwrap();
    let mut batch = Batch::default();
    for step in [3, 9, 7] {
        source.fill(Draw::training(step), &mut batch).unwrap();
    }
    assert_eq!(batch, seventh);
    assert_ne!(filled(&task, Draw::training(8)).inputs, seventh.inputs);
    assert_ne!(filled(&task, Draw::evaluation(Split::Validation, 7)).inputs, seventh.inputs);
    source = task.source(1338).unwrap();
    source.fill(Draw::training(7), &mut batch).unwrap();
    assert_ne!(batch.inputs, seventh.inputs);
    // A smaller batch has the same first rows.
    let small = filled(&Recall { batch: 2, ..task }, Draw::training(7));
    assert_eq!(small.inputs, seventh.inputs[..small.inputs.len()]);
}

#[test]
fn gaps_follow_the_power_law() {
    // With one pair there is one query, so its place has exactly the distribution of the weights.
    let task = Recall { batch: 20_000, block: 22, pairs: 1, ..Recall::default() };
    let batch = filled(&task, Draw::training(0));
    let mut counts = [0_usize; 10];
    for (_, targets) in rows(&batch) {
        let at = targets.iter().position(|&target| target != IGNORED).unwrap();
        counts[(at - 2) / 2] += 1;
    }
    let weights: Vec<f64> = (1..=10).map(|n| f64::from(n).powf(0.01 - 1.0)).collect();
    let sum: f64 = weights.iter().sum();
    for (count, weight) in counts.iter().zip(&weights) {
        let expected = 20_000.0 * weight / sum;
        // Five standard deviations.
        assert!((*count as f64 - expected).abs() < 5.0 * expected.sqrt(), "{counts:?}");
    }
}

#[test]
fn random_fillers_cover_the_vocabulary() {
    let task = Recall { batch: 512, ..Recall::default() };
    let batch = filled(&task, Draw::training(0));
    let mut counts = [0_usize; 64];
    rows(&batch).for_each(|(inputs, _)| inputs[8..].iter().for_each(|&token| counts[token as usize] += 1));
    let total: usize = counts.iter().sum();
    assert!(counts.iter().all(|&count| (total / 128..total / 32).contains(&count)), "{counts:?}");
}

#[test]
fn impossible_tasks_are_errors() {
    let message = |task: Recall| task.source(0).unwrap_err().to_string();
    let text = message(Recall { pairs: 32, block: 1024, ..Recall::default() });
    assert!(text.contains("vocabulary: 64 has 31") && text.contains("a vocabulary of at least 66"), "{text}");
    let text = message(Recall { pairs: 17, ..Recall::default() });
    assert!(text.contains("block: 64 is too short for pairs: 17 and queries: 1, which need 68 tokens"), "{text}");
    assert!(message(Recall { pairs: 0, ..Recall::default() }).contains("pairs: 0"));
    assert!(message(Recall { queries: 0, ..Recall::default() }).contains("queries: 0"));
    assert!(message(Recall { queries: usize::MAX, ..Recall::default() }).contains("too short"));
    assert!(message(Recall { vocabulary: 0, ..Recall::default() }).contains("vocabulary: 0 has 0"));
    assert!(message(Recall { vocabulary: usize::MAX, ..Recall::default() }).contains("too large"));
    assert!(message(Recall { power_a: f64::NAN, ..Recall::default() }).contains("power_a: NaN"));
    assert!(message(Recall { batch: 0, ..Recall::default() }).contains("batch: 0"));
    assert!(Recall { pairs: 31, vocabulary: 64, block: 124, ..Recall::default() }.source(0).is_ok());
    for power_a in [-10.0, 0.0, 1.0, 10.0] {
        assert!(Recall { power_a, batch: 1, block: 1 << 14, ..Recall::default() }.source(0).is_ok());
    }
}

#[test]
fn ron_form() {
    let task: Recall = ron::from_str("(batch: 8, block: 32, pairs: 4, fillers: Zero)").unwrap();
    assert_eq!(task, Recall { batch: 8, block: 32, pairs: 4, fillers: Fillers::Zero, ..Recall::default() });
    assert!(ron::from_str::<Recall>("(pears: 4)").unwrap_err().to_string().contains("pears"));
}

#[test]
fn the_curriculum_fades_fillers_in_for_training_only() {
    let task = Recall { block: 64, curriculum: 100, ..Recall::default() };
    let mut source = task.source(1).unwrap();
    let mut batch = Batch::new(1, 1);
    let mut random_share = |draw: Draw| {
        source.fill(draw, &mut batch).unwrap();
        let fillers = batch.inputs.chunks(64).flat_map(|row| &row[8..]).filter(|&&token| token != 0).count();
        // four of the places are queries, and a random filler is 0 now and then
        (fillers as f64 / batch.batch as f64 - 4.0) / 52.0
    };
    assert_eq!(random_share(Draw::training(0)), 0.0);
    let half = random_share(Draw::training(50));
    assert!((0.4..0.6).contains(&half), "{half}");
    for whole in [random_share(Draw::training(100)), random_share(Draw::evaluation(Split::Train, 0))] {
        assert!(whole > 0.95, "{whole}");
    }
}
